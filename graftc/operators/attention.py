"""Softmax attention: the self-graft, and grouped-query or multi-query attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """[batch, tokens, heads · head_dim] to [batch, heads, tokens, head_dim]."""
    return x.reshape(x.shape[0], x.shape[1], heads, head_dim).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] to [batch, tokens, heads · head_dim]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Each head `times` times in a row: [batch, h, tokens, d] to [batch, h · times, tokens, d]."""
    if times == 1:
        return x
    batch, heads, tokens, head_dim = x.shape
    x = x.unsqueeze(2).expand(batch, heads, times, tokens, head_dim)
    return x.reshape(batch, heads * times, tokens, head_dim)


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
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        q = split_heads(q, self.heads, self.head_dim)
        k = repeat_heads(split_heads(k, self.kv_heads, self.head_dim), self.heads // self.kv_heads)
        v = repeat_heads(split_heads(v, self.kv_heads, self.head_dim), self.heads // self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(merge_heads(y))
