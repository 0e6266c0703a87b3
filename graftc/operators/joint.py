"""Joint attention: two streams of tokens that see each other in one softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftc.operators.heads import HeadMixer, attend, make_norm, normalise


class JointAttention(HeadMixer):
    """(y1, y2) = out(softmax(scale · q kᵀ) v), q, k and v of both streams put together; by heads.

    x and y1 are [batch, tokens, dim], context and y2 [batch, its tokens, context_dim]. `in_proj` holds the
    rows of q, k and v of x, `in_proj_2` those of the context (SD3, arXiv 2403.03206, section 4); fewer `kv_heads`
    are shared by groups of query heads, in both streams. `second` says
    what becomes of the context: `own`, it has projections of its own, in and out; `hidden`, it is only looked
    at, and y1 alone is returned (SD3's last block); `shared`, it goes through those of x (CogVideoX).
    `swapped`: the tokens of the context come first, which is the order that a mask, cos and sin are in.
    `qk_norm`, with weights for each stream unless `shared`, `scale` and `softcap` are those of `Attention`.

    >>> op = JointAttention(dim=8, context_dim=6, heads=2)
    >>> [tuple(y.shape) for y in op(torch.zeros(1, 5, 8), torch.zeros(1, 3, 6))]
    [(1, 5, 8), (1, 3, 6)]
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        second: str = "own",
        swapped: bool = False,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__("attention", dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap)
        if second not in ("own", "hidden", "shared"):
            raise ValueError(f"attention: unknown second {second!r}, wanted own, hidden or shared")
        if second == "shared" and context_dim != dim:
            raise ValueError(
                f"attention: streams of {dim} and {context_dim} features share no maps"
            )
        self.second = second
        self.swapped = swapped
        inner = heads * self.head_dim
        self.in_proj = nn.Linear(dim, self.rows)
        self.in_proj_2 = None if second == "shared" else nn.Linear(context_dim, self.rows)
        kind = "none" if second == "shared" else qk_norm
        size = (self.head_dim, norm_eps, norm_affine)
        self.q_norm_2 = make_norm("attention", kind, norm_over, heads, *size)
        self.k_norm_2 = make_norm("attention", kind, norm_over, self.kv_heads, *size)
        self.out_proj = nn.Linear(inner, dim)
        self.out_proj_2 = nn.Linear(inner, context_dim) if second == "own" else None

    def heads_of(self, x: Tensor, of_context: bool) -> list[Tensor]:
        """q, k and v of one stream, [batch, tokens, heads, head_dim] each."""
        if of_context and self.in_proj_2 is not None:
            q, k, v = self.split(self.in_proj_2(x))
            return [normalise(q, self.q_norm_2), normalise(k, self.k_norm_2), v]
        q, k, v = self.split(self.in_proj(x))
        return [*self.normed(q, k), v]

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        own, other = self.heads_of(x, False), self.heads_of(context, True)
        first, last = (other, own) if self.swapped else (own, other)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(first, last, strict=True))
        q, k = self.turned(q, k, cos, sin)
        y = attend(q, k, v, self.scale, mask, softcap=self.softcap).flatten(2)
        begin, end = y.split([first[0].shape[1], last[0].shape[1]], dim=1)
        y1, y2 = (end, begin) if self.swapped else (begin, end)
        if self.second == "hidden":
            return self.out_proj(y1)
        out_2 = self.out_proj if self.out_proj_2 is None else self.out_proj_2
        return self.out_proj(y1), out_2(y2)
