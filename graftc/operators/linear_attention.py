"""Linear attention: a positive feature map in place of softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_sum(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ_{j ≤ i} (q_i · k_j) v_j for every i, in chunks: linear in the tokens.

    q, k: [batch, tokens, heads, d]; v and the result: [batch, tokens, heads, e]. Inside a chunk
    the products are masked; what lies before it comes as one running sum of k_jᵀ v_j.
    """
    batch, tokens, heads, _ = q.shape
    # Row r of what follows is one chunk of one head of one sample. Chunks are cut by index, the
    # last one filled up with its last token, which nothing sees: no shape then depends on a
    # remainder, and torch.export takes any batch and length; it needs the two chunks as well.
    chunks: int = torch.sym_max(2, (tokens + chunk - 1) // chunk)  # type: ignore[assignment]
    row = torch.arange(batch * heads * chunks, device=q.device).unsqueeze(1)
    sequence = row // chunks
    block = row - sequence * chunks
    step = torch.arange(chunk, device=q.device)
    position = (block * chunk + step).clamp(max=tokens - 1)
    index = (sequence // heads, position, sequence % heads)
    q, k, v = q[index], k[index], v[index]

    inside = (q @ k.transpose(1, 2)).masked_fill(step > step.unsqueeze(1), 0.0) @ v
    state = (k.transpose(1, 2) @ v).reshape(batch * heads, chunks, k.shape[2], v.shape[2])
    before = F.pad(state.cumsum(dim=1), (0, 0, 0, 0, 1, 0))
    y = inside + q @ before[sequence.squeeze(1), block.squeeze(1)]

    token = torch.arange(tokens, device=q.device).unsqueeze(1)
    first = (torch.arange(batch * heads, device=q.device) * chunks).reshape(batch, 1, heads)
    return y[first + token // chunk, token % chunk]


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
        batch, tokens, _ = x.shape
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        groups = self.heads // self.kv_heads
        q = self.features(q.reshape(batch, tokens, self.heads, self.head_dim))
        k = self.features(k.reshape(batch, tokens, self.kv_heads, self.head_dim))
        v = v.reshape(batch, tokens, self.kv_heads, self.head_dim).to(q.dtype)
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        # A last column of ones turns into the normaliser, by the same products.
        v = F.pad(v, (0, 1), value=1.0)
        if self.causal:
            y = causal_sum(q, k, v, chunk=64)
        else:
            state = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
            y = (q.transpose(1, 2) @ state).transpose(1, 2)
        y = (y[..., :-1] / (y[..., -1:] + self.eps)).to(x.dtype)
        return self.out_proj(y.reshape(batch, tokens, inner))
