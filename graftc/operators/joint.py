"""Joint attention: two streams of tokens that see each other in one softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.heads import (
    check_rotary,
    four_dimensions,
    head_sizes,
    make_norm,
    normalise,
    rotate,
)


class JointAttention(nn.Module):
    """(y1, y2) = out(softmax(scale · q kᵀ) v), q, k and v of both streams put together; by heads.

    x and y1 are [batch, tokens, dim], context and y2 [batch, its tokens, context_dim]. `in_proj` holds the
    rows of q, k and v of x, `in_proj_2` those of the context (SD3, arXiv 2403.03206, section 4). `second` says
    what becomes of the context: `own`, it has projections of its own, in and out; `hidden`, it is only looked
    at, and y1 alone is returned (SD3's last block); `shared`, it goes through those of x (CogVideoX).
    `swapped`: the tokens of the context come first, which is the order that a mask, cos and sin are in.
    `qk_norm`, with weights for each stream unless `shared`, and `scale` are those of `Attention`.

    >>> op = JointAttention(dim=8, context_dim=6, heads=2)
    >>> [tuple(y.shape) for y in op(torch.zeros(1, 5, 8), torch.zeros(1, 3, 6))]
    [(1, 5, 8), (1, 3, 6)]
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        head_dim: int | None = None,
        second: str = "own",
        swapped: bool = False,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        _, head_dim = head_sizes("attention", dim, heads, None, head_dim)
        if second not in ("own", "hidden", "shared"):
            raise ValueError(f"attention: unknown second {second!r}, wanted own, hidden or shared")
        if second == "shared" and context_dim != dim:
            raise ValueError(
                f"attention: streams of {dim} and {context_dim} features share no maps"
            )
        self.heads = heads
        self.head_dim = head_dim
        self.second = second
        self.swapped = swapped
        self.rotary = check_rotary("attention", rotary)
        self.scale = head_dim**-0.5 if scale is None else scale
        inner = heads * head_dim
        norm = ("attention", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine)
        shared = second == "shared"
        self.in_proj = nn.Linear(dim, 3 * inner)
        self.in_proj_2 = None if shared else nn.Linear(context_dim, 3 * inner)
        self.q_norm, self.k_norm = make_norm(*norm), make_norm(*norm)
        self.q_norm_2 = None if shared else make_norm(*norm)
        self.k_norm_2 = None if shared else make_norm(*norm)
        self.out_proj = nn.Linear(inner, dim)
        self.out_proj_2 = nn.Linear(inner, context_dim) if second == "own" else None

    def heads_of(self, x: Tensor, of_context: bool) -> list[Tensor]:
        """q, k and v of one stream, [batch, tokens, heads, head_dim] each."""
        in_proj, norms = self.in_proj, (self.q_norm, self.k_norm)
        if of_context and self.in_proj_2 is not None:
            in_proj, norms = self.in_proj_2, (self.q_norm_2, self.k_norm_2)
        q, k, v = in_proj(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return [normalise(q, norms[0]), normalise(k, norms[1]), v]

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
        q, k = rotate(q, cos, sin, self.rotary), rotate(k, cos, sin, self.rotary)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if mask is None else four_dimensions(mask),
            scale=self.scale,
        )
        y = y.transpose(1, 2).flatten(2)
        begin, end = y.split([first[0].shape[1], last[0].shape[1]], dim=1)
        y1, y2 = (end, begin) if self.swapped else (begin, end)
        if self.second == "hidden":
            return self.out_proj(y1)
        out_2 = self.out_proj if self.out_proj_2 is None else self.out_proj_2
        return self.out_proj(y1), out_2(y2)
