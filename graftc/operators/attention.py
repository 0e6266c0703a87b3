"""Softmax attention: the self-graft, grouped-query, multi-query and low-rank latent attention."""

from __future__ import annotations

from torch import Tensor, nn

from graftc.operators.heads import HeadMixer, attend, rotate


class Attention(HeadMixer):
    """y = out(softmax(scale · q kᵀ) v), by heads; x and y are [batch, tokens, dim].

    `in_proj` holds the rows of q, k and v in this order, head by head. With fewer `kv_heads`
    each of them serves `heads / kv_heads` query heads: grouped-query (arXiv 2305.13245,
    section 2), or multi-query at one. The default is as many of `dim / heads` each.
    `scale` is 1 / √head_dim if not given. `qk_norm`, `rms_norm` or `layer_norm`, normalises q and k
    before they are turned, each head (SD3, arXiv 2403.03206, section 5.3.2) or, with `norm_over =
    width`, all heads together. `softcap` bounds the scores, softcap · tanh(scores / softcap)
    (Gemma 2, arXiv 2408.00118). A mask is added to the scores, or hides where it is False; cos and
    sin turn q and k where `rotary` says how. Without `out` there is no last map, and y is
    [batch, tokens, heads · head_dim]; with `out_dim` it gives as many features. `tokens_first`: x and y are
    [tokens, batch, …].

    >>> import torch
    >>> Attention(dim=8, heads=4, kv_heads=2)(torch.zeros(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        out: bool = True,
        out_dim: int | None = None,
        tokens_first: bool = False,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__("attention", dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap)
        self.causal = causal
        self.tokens_first = tokens_first
        self.in_proj = nn.Linear(dim, self.rows)
        self.out_proj = nn.Linear(heads * self.head_dim, out_dim or dim) if out else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        if self.tokens_first:
            x = x.transpose(0, 1)
        q, k, v = self.split(self.in_proj(x))
        q, k = self.turned(*self.normed(q, k), cos, sin)
        y = attend(q, k, v, self.scale, mask, self.causal, self.softcap).flatten(2)
        y = y if self.out_proj is None else self.out_proj(y)
        return y.transpose(0, 1) if self.tokens_first else y


class CrossAttention(HeadMixer):
    """y = out(softmax(scale · q kᵀ) v), q of x, k and v of the context; by heads.

    x and y are [batch, tokens, dim], context is [batch, its tokens, context_dim]. `q_proj` holds
    the rows of q, `kv_proj` those of k and v, in this order, head by head. Fewer `kv_heads` are
    shared by groups of query heads (arXiv 2305.13245). A mask is added to the scores, or hides
    where it is False. `qk_norm`, `scale`, `softcap`, `out`, `out_dim` and `tokens_first` are of `Attention`;
    `rotary` turns q alone, as a context has no such positions (HunyuanDiT).

    >>> import torch
    >>> op = CrossAttention(dim=8, context_dim=6, heads=4, kv_heads=2)
    >>> op(torch.zeros(1, 3, 8), torch.zeros(1, 5, 6)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        out: bool = True,
        out_dim: int | None = None,
        tokens_first: bool = False,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            "cross_attention", dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap
        )
        self.tokens_first = tokens_first
        self.q_proj = nn.Linear(dim, heads * self.head_dim)
        self.kv_proj = nn.Linear(context_dim, 2 * self.kv_heads * self.head_dim)
        self.out_proj = nn.Linear(heads * self.head_dim, out_dim or dim) if out else None

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        if self.tokens_first:
            x, context = x.transpose(0, 1), context.transpose(0, 1)
        k, v = self.kv_proj(context).chunk(2, dim=-1)
        q, k = self.normed(self.by_head(self.q_proj(x)), self.by_head(k))
        q = rotate(q, cos, sin, self.rotary)
        y = attend(q, k, self.by_head(v), self.scale, mask, softcap=self.softcap).flatten(2)
        y = y if self.out_proj is None else self.out_proj(y)
        return y.transpose(0, 1) if self.tokens_first else y


class LatentAttention(HeadMixer):
    """y = out(softmax(scale · q kᵀ) v), [k, v] = up(down(x)); x and y are [batch, tokens, dim].

    k and v of all heads come from one latent vector of `rank` numbers a token, which is what a
    decoder caches. As in multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section
    2.1), but that rotary positions, where the site has them, turn all of k. `q_proj` holds the
    rows of q, `kv_up` those of k and v in this order, head by head; `qk_norm`, `scale` and `softcap`
    are those of `Attention`.

    >>> import torch
    >>> LatentAttention(dim=8, heads=2, rank=3)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        rank: int,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            "latent_attention", dim, heads, None, head_dim, rotary, *norm, scale, softcap
        )
        if rank < 1:
            raise ValueError(f"latent_attention: rank is {rank}, wanted at least 1")
        self.causal = causal
        inner = heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner)
        self.kv_down = nn.Linear(dim, rank, bias=False)
        self.kv_up = nn.Linear(rank, 2 * inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        k, v = self.kv_up(self.kv_down(x)).chunk(2, dim=-1)
        q, k = self.normed(self.by_head(self.q_proj(x)), self.by_head(k))
        q, k = self.turned(q, k, cos, sin)
        y = attend(q, k, self.by_head(v), self.scale, mask, self.causal, self.softcap)
        return self.out_proj(y.flatten(2))
