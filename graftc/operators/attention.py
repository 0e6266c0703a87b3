"""Softmax attention: the self-graft, and grouped-query or multi-query attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """y = out(softmax(q kᵀ / √d) v), by heads; x and y are [batch, tokens, dim].

    `in_proj` holds the rows of q, k and v in this order, head by head. With fewer `kv_heads`
    each of them serves `heads / kv_heads` query heads: grouped-query (arXiv 2305.13245,
    section 2), or multi-query at one. The default is as many of `dim / heads` each.

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
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"attention: heads {heads} is not a multiple of kv_heads {kv_heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"attention: dim {dim} is not divisible by heads {heads}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.causal = causal
        self.in_proj = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        groups = self.heads // self.kv_heads
        q = q.reshape(batch, tokens, self.heads, self.head_dim)
        k = k.reshape(batch, tokens, self.kv_heads, self.head_dim).repeat_interleave(groups, dim=2)
        v = v.reshape(batch, tokens, self.kv_heads, self.head_dim).repeat_interleave(groups, dim=2)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=self.causal
        )
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, inner))
