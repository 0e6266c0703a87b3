"""Softmax attention: the self-graft, grouped-query, multi-query and low-rank latent attention."""

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


class Attention(nn.Module):
    """y = out(softmax(scale · q kᵀ) v), by heads; x and y are [batch, tokens, dim].

    `in_proj` holds the rows of q, k and v in this order, head by head. With fewer `kv_heads`
    each of them serves `heads / kv_heads` query heads: grouped-query (arXiv 2305.13245,
    section 2), or multi-query at one. The default is as many of `dim / heads` each.
    `scale` is 1 / √head_dim if not given. `qk_norm`, `rms_norm` or `layer_norm`, normalises q and k
    before they are turned, each head (SD3, arXiv 2403.03206, section 5.3.2) or, with `norm_over =
    width`, all heads together. A mask is added to the scores, or hides where it is False; cos and
    sin turn q and k where `rotary` says how. Without `out` there is no last map, and y is
    [batch, tokens, heads · head_dim]. `tokens_first`: x and y are [tokens, batch, …].

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
        out: bool = True,
        tokens_first: bool = False,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = head_sizes("attention", dim, heads, kv_heads, head_dim)
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.rotary = check_rotary("attention", rotary)
        self.in_proj = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim)
        self.q_norm = make_norm(
            "attention", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine
        )
        self.k_norm = make_norm(
            "attention", qk_norm, norm_over, kv_heads, head_dim, norm_eps, norm_affine
        )
        self.tokens_first = tokens_first
        self.scale = head_dim**-0.5 if scale is None else scale
        self.out_proj = nn.Linear(heads * head_dim, dim) if out else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        if self.tokens_first:
            x = x.transpose(0, 1)
        batch, tokens, _ = x.shape
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        q = normalise(q.reshape(batch, tokens, self.heads, self.head_dim), self.q_norm)
        k = normalise(k.reshape(batch, tokens, self.kv_heads, self.head_dim), self.k_norm)
        v = v.reshape(batch, tokens, self.kv_heads, self.head_dim)
        q, k = rotate(q, cos, sin, self.rotary), rotate(k, cos, sin, self.rotary)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        if mask is not None:
            mask = _also_causal(four_dimensions(mask), tokens, self.causal)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.scale,
        )
        y = y.transpose(1, 2).reshape(batch, tokens, inner)
        y = y if self.out_proj is None else self.out_proj(y)
        return y.transpose(0, 1) if self.tokens_first else y


def _also_causal(mask: Tensor, tokens: int, causal: bool) -> Tensor:
    """`mask`, and where `causal` no later token."""
    if not causal:
        return mask
    step = torch.arange(tokens, device=mask.device)
    seen = step.unsqueeze(1) >= step
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


class CrossAttention(nn.Module):
    """y = out(softmax(scale · q kᵀ) v), q of x, k and v of the context; by heads.

    x and y are [batch, tokens, dim], context is [batch, its tokens, context_dim]. `q_proj` holds
    the rows of q, `kv_proj` those of k and v, in this order, head by head. Fewer `kv_heads` are
    shared by groups of query heads (arXiv 2305.13245). A mask is added to the scores, or hides
    where it is False. `qk_norm`, `scale`, `out` and `tokens_first` are those of `Attention`; `rotary` turns q alone,
    as a context has no such positions (HunyuanDiT).

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
        out: bool = True,
        tokens_first: bool = False,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = head_sizes("cross_attention", dim, heads, kv_heads, head_dim)
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, heads * head_dim)
        self.kv_proj = nn.Linear(context_dim, 2 * kv_heads * head_dim)
        self.rotary = check_rotary("cross_attention", rotary)
        self.q_norm = make_norm(
            "cross_attention", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine
        )
        self.k_norm = make_norm(
            "cross_attention", qk_norm, norm_over, kv_heads, head_dim, norm_eps, norm_affine
        )
        self.tokens_first = tokens_first
        self.scale = head_dim**-0.5 if scale is None else scale
        self.out_proj = nn.Linear(heads * head_dim, dim) if out else None

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
        batch, tokens, _ = x.shape
        keys = context.shape[1]
        q = self.q_proj(x).reshape(batch, tokens, self.heads, self.head_dim)
        q = rotate(normalise(q, self.q_norm), cos, sin, self.rotary)
        k, v = self.kv_proj(context).chunk(2, dim=-1)
        groups = self.heads // self.kv_heads
        k = normalise(k.reshape(batch, keys, self.kv_heads, self.head_dim), self.k_norm)
        v = v.reshape(batch, keys, self.kv_heads, self.head_dim)
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        if mask is not None:
            mask = four_dimensions(mask)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            scale=self.scale,
        )
        y = y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim)
        y = y if self.out_proj is None else self.out_proj(y)
        return y.transpose(0, 1) if self.tokens_first else y


class LatentAttention(nn.Module):
    """y = out(softmax(scale · q kᵀ) v), [k, v] = up(down(x)); x and y are [batch, tokens, dim].

    k and v of all heads come from one latent vector of `rank` numbers a token, which is what a
    decoder caches. As in multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section
    2.1), but that rotary positions, where the site has them, turn all of k. `q_proj` holds the
    rows of q, `kv_up` those of k and v in this order, head by head; `qk_norm` and `scale` are those
    of `Attention`.

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
    ) -> None:
        super().__init__()
        _, head_dim = head_sizes("latent_attention", dim, heads, None, head_dim)
        if rank < 1:
            raise ValueError(f"latent_attention: rank is {rank}, wanted at least 1")
        self.heads = heads
        self.head_dim = head_dim
        self.causal = causal
        self.rotary = check_rotary("latent_attention", rotary)
        self.q_proj = nn.Linear(dim, heads * head_dim)
        self.kv_down = nn.Linear(dim, rank, bias=False)
        self.kv_up = nn.Linear(rank, 2 * heads * head_dim)
        self.q_norm = make_norm(
            "latent_attention", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine
        )
        self.k_norm = make_norm(
            "latent_attention", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine
        )
        self.scale = head_dim**-0.5 if scale is None else scale
        self.out_proj = nn.Linear(heads * head_dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        batch, tokens, _ = x.shape
        shape = (batch, tokens, self.heads, self.head_dim)
        k, v = self.kv_up(self.kv_down(x)).chunk(2, dim=-1)
        q, k = (
            normalise(self.q_proj(x).reshape(shape), self.q_norm),
            normalise(k.reshape(shape), self.k_norm),
        )
        q, k = rotate(q, cos, sin, self.rotary), rotate(k, cos, sin, self.rotary)
        v = v.reshape(shape)
        if mask is not None:
            mask = _also_causal(four_dimensions(mask), tokens, self.causal)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.scale,
        )
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))
