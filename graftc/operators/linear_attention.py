"""Linear attention: a positive feature map in place of softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """[batch, tokens, heads · head_dim] to [batch, heads, tokens, head_dim]."""
    return x.reshape(x.shape[0], x.shape[1], heads, head_dim).transpose(1, 2)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Each head `times` times in a row: [batch, h, tokens, d] to [batch, h · times, tokens, d]."""
    if times == 1:
        return x
    batch, heads, tokens, head_dim = x.shape
    x = x.unsqueeze(2).expand(batch, heads, times, tokens, head_dim)
    return x.reshape(batch, heads * times, tokens, head_dim)


def causal_sum(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ_{j ≤ i} (q_i · k_j) v_j for every i, in chunks: linear in the tokens.

    q, k: [batch, heads, tokens, d]; v: [batch, heads, tokens, e]. Inside a chunk the products
    are masked; what lies before it comes as one running sum of k_jᵀ v_j.
    """
    batch, heads, tokens, _ = q.shape
    chunks = (tokens + chunk - 1) // chunk
    padding = (0, 0, 0, chunks * chunk - tokens)
    q = F.pad(q, padding).reshape(batch, heads, chunks, chunk, q.shape[3])
    k = F.pad(k, padding).reshape(batch, heads, chunks, chunk, k.shape[3])
    v = F.pad(v, padding).reshape(batch, heads, chunks, chunk, v.shape[3])
    position = torch.arange(chunk, device=q.device)
    later = position > position.unsqueeze(1)
    inside = (q @ k.transpose(-2, -1)).masked_fill(later, 0.0) @ v
    state = (k.transpose(-2, -1) @ v).cumsum(dim=2)
    before = F.pad(state, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    y = inside + q @ before
    return y.reshape(batch, heads, chunks * chunk, v.shape[4])[:, :, :tokens]


class LinearAttention(nn.Module):
    """y_i = out(Σ_j (φ(q_i) · φ(k_j)) v_j / Σ_j φ(q_i) · φ(k_j)); x and y: [batch, tokens, dim].

    φ is elu(x) + 1 (`elu1`, arXiv 2006.16236) or relu (Sana, arXiv 2410.10629). The sums run
    over all tokens, or over j ≤ i where `causal`. `in_proj` holds the rows of q, k and v in
    this order; fewer `kv_heads` are shared by groups of query heads. The sums are taken in
    float32 at least, as half precision overflows at some thousand tokens.

    >>> LinearAttention(dim=8, heads=2, feature="relu")(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature: str = "elu1",
        causal: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if feature not in ("elu1", "relu"):
            raise ValueError(f"linear_attention: unknown feature {feature!r}, wanted elu1 or relu")
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"linear_attention: heads {heads} is not a multiple of kv_heads {kv_heads}"
            )
        if head_dim is None and dim % heads:
            raise ValueError(f"linear_attention: dim {dim} is not divisible by heads {heads}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.feature = feature
        self.causal = causal
        self.eps = 1e-6  # relu may leave a token with nothing to see
        self.in_proj = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def features(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.relu(x) if self.feature == "relu" else F.elu(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        groups = self.heads // self.kv_heads
        q = self.features(split_heads(q, self.heads, self.head_dim))
        k = repeat_heads(
            self.features(split_heads(k, self.kv_heads, self.head_dim)), groups
        )
        v = repeat_heads(split_heads(v, self.kv_heads, self.head_dim), groups).to(q.dtype)
        # A last column of ones turns into the normaliser, by the same products.
        v = F.pad(v, (0, 1), value=1.0)
        y = causal_sum(q, k, v, chunk=64) if self.causal else q @ (k.transpose(-2, -1) @ v)
        y = (y[..., :-1] / (y[..., -1:] + self.eps)).to(x.dtype)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], inner))
