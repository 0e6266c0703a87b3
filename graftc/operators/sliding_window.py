"""Sliding-window attention, in blocks, for any length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.chunks import cut, filled
from graftc.operators.heads import HeadMixer, broadcast_mask, capped, one_form, shut, weights


class SlidingWindow(HeadMixer):
    """Softmax attention of each token to those at most `window` away; x, y: [batch, tokens, dim].

    y_i = out(Σ_j softmax_j(scale · q_i · k_j) v_j) over |i − j| ≤ window, or 0 ≤ i − j ≤ window
    where `causal`. `in_proj` holds the rows of q, k and v in this order; fewer `kv_heads` are
    shared by groups of query heads. The tokens are cut into blocks, and a block of queries sees
    its own keys and `window` of each neighbour's: the cost grows linearly with the tokens. `form =
    dense` computes the same from all pairs, which is faster where there are few tokens. A mask
    is added to the scores, or hides where it is False; a token all of whose keys it hides gets y = out(0).
    cos and sin turn q and k where `rotary` says how, after `qk_norm` (see `Attention`, as for `scale`
    and `softcap`).

    >>> SlidingWindow(dim=8, heads=2, window=4)(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    forms: tuple[str, ...] = ("blocks", "dense")

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: str = "none",
        form: str = "auto",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            "sliding_window", dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap
        )
        self.form = one_form("sliding_window", form, self.forms)
        if window < 1:
            raise ValueError(f"sliding_window: window is {window}, wanted at least 1")
        self.window = window
        self.causal = causal
        self.block = max(window, 16)  # smaller blocks waste less, larger ones multiply faster
        self.in_proj = nn.Linear(dim, self.rows)
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.split(self.in_proj(x))
        q, k = self.turned(*self.normed(q, k), cos, sin)
        return self.out_proj(self.mix(q, k, v, mask).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted means; q, k, v: [batch, tokens, heads, head_dim]."""
        q, tokens = q * self.scale, q.shape[1]
        if self.form == "dense" or tokens == 0:
            return self._dense(q, k, v, mask)
        if type(tokens) is int and mask is None:
            return self._sliced(q, k, v)
        # By index: of a length that is a symbol (torch.export), nothing may depend on a remainder.
        return self._blocks(q, k, v, mask)

    def _sliced(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Block by block, as reshapes and slices; q (scaled), k, v: [batch, tokens, heads, head_dim]."""
        tokens, block = q.shape[1], self.block
        after = 0 if self.causal else self.window
        blocks = -(-tokens // block)
        q = filled(q, tokens, blocks * block).unflatten(1, (blocks, block)).transpose(2, 3)
        k, v = (self._around(t, blocks, after) for t in (k, v))
        at = torch.arange(blocks * block, device=q.device).reshape(blocks, 1, block, 1)
        key = torch.arange(-self.window, block + after, device=q.device)
        distance = key - torch.arange(block, device=q.device).unsqueeze(1)
        seen = (distance >= -self.window) & (distance <= after)
        key = at[:, :, :1] + key
        seen = seen & (key >= 0) & (key < tokens)  # [blocks, 1, queries, keys]
        scores = capped(q @ k.transpose(-1, -2), self.softcap)
        y = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(dim=-1) @ v
        return cut(y.transpose(2, 3).flatten(1, 2), tokens)

    def _around(self, x: Tensor, blocks: int, after: int) -> Tensor:
        """What each block of queries may see, `window` before it to `after` behind: [batch, blocks, heads, keys, d]."""
        block, more = self.block, self.window + after
        right = (blocks + 2) * block - self.window - x.shape[1]
        x = F.pad(x, (0, 0, 0, 0, self.window, right))
        pieces = [
            x[:, i * block : (i + blocks) * block].unflatten(1, (blocks, block))[
                :, :, : more + block - i * block
            ]
            for i in range(3)
            if more + block > i * block
        ]
        return (
            torch.cat(pieces, dim=2)
            .transpose(2, 3)
            .repeat_interleave(self.heads // self.kv_heads, dim=2)
        )

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Block by block; q (scaled), k, v: [batch, tokens, heads, head_dim]."""
        batch, tokens, _, _ = q.shape
        # Row r of what follows is one block of one head of one sample. Blocks are cut by index:
        # no shape then depends on a remainder, and torch.export takes any batch and length.
        blocks = (tokens + self.block - 1) // self.block
        row = torch.arange(batch * self.heads * blocks, device=q.device).unsqueeze(1)
        sequence = row // blocks
        sample, head = sequence // self.heads, sequence % self.heads
        start = (row - sequence * blocks) * self.block
        after = 0 if self.causal else self.window
        query = start + torch.arange(self.block, device=q.device)
        key = start + torch.arange(-self.window, self.block + after, device=q.device)
        distance = key.unsqueeze(1) - query.unsqueeze(2)
        seen = (distance >= -self.window) & (distance <= after)
        seen = seen & ((key >= 0) & (key < tokens)).unsqueeze(1)

        kv_head = head // (self.heads // self.kv_heads)
        q = q[sample, query.clamp(max=tokens - 1), head]
        k = k[sample, key.clamp(0, tokens - 1), kv_head]
        v = v[sample, key.clamp(0, tokens - 1), kv_head]
        scores = capped(q @ k.transpose(1, 2), self.softcap)
        if mask is None:
            # The lowest number, not -inf: a padded query sees nothing, and must not become NaN.
            y = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(dim=-1) @ v
        else:
            whole = broadcast_mask(mask, batch, self.heads, tokens)
            rows = query.clamp(max=tokens - 1).unsqueeze(2)
            columns = key.clamp(0, tokens - 1).unsqueeze(1)
            mask = whole[sample.unsqueeze(2), head.unsqueeze(2), rows, columns]
            y = weights(scores, ~seen | shut(mask), mask) @ v

        token = torch.arange(tokens, device=q.device).unsqueeze(1)
        first = torch.arange(batch * self.heads, device=q.device) * blocks
        first = first.reshape(batch, 1, self.heads)
        return y[first + token // self.block, token % self.block]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """All pairs, those outside the window hidden; q (scaled), k, v: [batch, tokens, heads, head_dim]."""
        batch, tokens, heads, _ = q.shape
        k = k.repeat_interleave(heads // self.kv_heads, dim=2)
        v = v.repeat_interleave(heads // self.kv_heads, dim=2)
        scores = capped(q.transpose(1, 2) @ k.permute(0, 2, 3, 1), self.softcap)
        at = torch.arange(tokens, device=q.device)
        distance = at.unsqueeze(0) - at.unsqueeze(1)
        seen = (distance >= -self.window) & (distance <= (0 if self.causal else self.window))
        if mask is None:
            weight = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(dim=-1)
        else:
            mask = broadcast_mask(mask, batch, heads, tokens)
            weight = weights(scores, ~seen | shut(mask), mask)
        return (weight @ v.transpose(1, 2)).transpose(1, 2)
