"""Sliding-window attention, in blocks, for any length."""

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


def with_neighbours(blocks: Tensor, window: int, causal: bool) -> Tensor:
    """Each block with the last `window` tokens before it and, unless causal, the first after it.

    blocks: [batch, heads, blocks, size, head_dim]; the tokens before the first block and after
    the last are zeros, which the caller masks.
    """
    before = F.pad(blocks[:, :, :, blocks.shape[3] - window :], (0, 0, 0, 0, 1, 0))[:, :, :-1]
    if causal:
        return torch.cat([before, blocks], dim=3)
    after = F.pad(blocks[:, :, :, :window], (0, 0, 0, 0, 0, 1))[:, :, 1:]
    return torch.cat([before, blocks, after], dim=3)


class SlidingWindow(nn.Module):
    """Softmax attention of each token to those at most `window` away; x, y: [batch, tokens, dim].

    y_i = out(Σ_j softmax_j(q_i · k_j / √d) v_j) over |i − j| ≤ window, or 0 ≤ i − j ≤ window
    where `causal`. `in_proj` holds the rows of q, k and v in this order; fewer `kv_heads` are
    shared by groups of query heads. The tokens are cut into blocks, and a block of queries sees
    its own keys and `window` of each neighbour's: the cost grows linearly with the tokens.

    >>> SlidingWindow(dim=8, heads=2, window=4)(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if window < 1:
            raise ValueError(f"sliding_window: window is {window}, wanted at least 1")
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"sliding_window: heads {heads} is not a multiple of kv_heads {kv_heads}"
            )
        if head_dim is None and dim % heads:
            raise ValueError(f"sliding_window: dim {dim} is not divisible by heads {heads}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.window = window
        self.causal = causal
        self.block = max(window, 16)  # smaller blocks waste less, larger ones multiply faster
        self.in_proj = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        groups = self.heads // self.kv_heads
        q = split_heads(q, self.heads, self.head_dim) * self.head_dim**-0.5
        k = repeat_heads(split_heads(k, self.kv_heads, self.head_dim), groups)
        v = repeat_heads(split_heads(v, self.kv_heads, self.head_dim), groups)

        blocks = torch.sym_max(2, (tokens + self.block - 1) // self.block)
        shape = (batch, self.heads, blocks, self.block, self.head_dim)
        # Padding by index, with the last token: no shape then depends on a remainder, which
        # torch.export could not prove.
        position = torch.arange(blocks * self.block, device=x.device).clamp(max=tokens - 1)
        q = q.index_select(2, position).reshape(shape)
        k = with_neighbours(k.index_select(2, position).reshape(shape), self.window, self.causal)
        v = with_neighbours(v.index_select(2, position).reshape(shape), self.window, self.causal)

        # Positions: of a block's queries, of its keys, and of the keys in the whole sequence.
        query = torch.arange(self.block, device=x.device).unsqueeze(1)
        key = torch.arange(k.shape[3], device=x.device) - self.window
        start = torch.arange(blocks, device=x.device).reshape(-1, 1, 1) * self.block
        near = (query - key <= self.window) & (key - query <= (0 if self.causal else self.window))
        seen = near & (start + key >= 0) & (start + key < tokens)

        scores = q @ k.transpose(-2, -1)
        # The lowest number, not -inf: a row of padding sees nothing, and must not become NaN.
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        y = scores.softmax(dim=-1) @ v
        token = torch.arange(tokens, device=x.device)
        y = y[:, :, token // self.block, token % self.block]
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, inner))
