"""Where attention goes, by distance: softmax rows are made block by block, never all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROW_ELEMENTS = 1 << 22
"""The most elements of attention weights, or of the keys beside them, that are in memory at once."""


def mass_by_distance(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    most: int = ROW_ELEMENTS,
) -> Tensor:
    """Attention mass at each distance |i − j|, summed over batch, heads and queries: [n] float64.

    `q` [batch, heads, n, d] and `k` [batch, kv_heads, n, d] as the attention op reads them (other leading
    dimensions do as well); `mask` as `scaled_dot_product_attention` takes it, boolean or added. A row that
    the mask hides whole has no mass. Beside q and k in one piece no tensor of more than `most` elements is made
    (one row of n, or one head's keys, where that is more).

    >>> q = torch.zeros(1, 1, 4, 2)
    >>> mass_by_distance(q, q).tolist()
    [1.0, 1.5, 1.0, 0.5]
    >>> round(mass_by_distance(q, q, causal=True)[0].item(), 5)  # 1 + 1/2 + 1/3 + 1/4
    2.08333
    """
    n, d = q.shape[-2:]
    lead = q.shape[:-2]
    # float16 overflows in the scores; float64 stays what it is.
    kind = torch.promote_types(q.dtype, torch.float32)
    factor = d**-0.5 if scale is None else scale
    heads = q.reshape(-1, n, d)
    keys, key_of = k.reshape(-1, k.shape[-2], d), _key_numbers(lead, k.shape[:-2], q.device)
    spread = None if mask is None else mask.expand(*lead, n, k.shape[-2])
    places = [i.reshape(-1) for i in _unravelled(lead, q.device)]
    group_cost = k.shape[-2] * d

    def rows(start: int, end: int, first: int, last: int) -> Tensor:
        own = keys[key_of[first:last]].to(kind)
        scores = torch.bmm(heads[first:last, start:end].to(kind) * factor, own.transpose(1, 2))
        if spread is not None:
            seen = spread[..., start:end, :][tuple(p[first:last] for p in places)]
            if seen.dtype == torch.bool:
                scores.masked_fill_(~seen, float("-inf"))
            else:
                scores += seen
        if causal:
            index = torch.arange(k.shape[-2], device=q.device)
            later = index > torch.arange(start, end, device=q.device)[:, None]
            scores.masked_fill_(later, float("-inf"))
        hidden = scores.amax(-1, keepdim=True) == float("-inf")
        return torch.softmax(scores, -1).masked_fill_(hidden, 0.0)

    return _by_distance(rows, len(heads), n, k.shape[-2], group_cost, most, q.device)


def mass_of_weights(weights: Tensor, *, most: int = ROW_ELEMENTS) -> Tensor:
    """As `mass_by_distance`, of weights [..., n, n] that the model has made itself.

    >>> mass_of_weights(torch.eye(3).expand(2, 3, 3)).tolist()
    [6.0, 0.0, 0.0]
    """
    n, m = weights.shape[-2:]
    lead = weights.shape[:-2]
    places = [i.reshape(-1) for i in _unravelled(lead, weights.device)]

    def rows(start: int, end: int, first: int, last: int) -> Tensor:
        if not places:
            return weights[start:end].unsqueeze(0)
        return weights[..., start:end, :][tuple(p[first:last] for p in places)]

    return _by_distance(rows, lead.numel(), n, m, 0, most, weights.device)


def _by_distance(
    rows: Callable[[int, int, int, int], Tensor],
    heads: int,
    n: int,
    m: int,
    group_cost: int,
    most: int,
    device: torch.device,
) -> Tensor:
    """Sums over blocks of rows; `rows(start, end, first, last)` gives [heads first..last, rows, m]."""
    block = max(1, min(n, most // m))
    group = max(1, most // max(block * m, group_cost, 1))
    total = torch.zeros(n, dtype=torch.float64, device=device)
    index = torch.arange(m, device=device)
    for start in range(0, n, block):
        end = min(start + block, n)
        summed = torch.zeros(end - start, m, dtype=torch.float64, device=device)
        for first in range(0, heads, group):
            summed += rows(start, end, first, min(first + group, heads)).sum(0, dtype=torch.float64)
        distance = (torch.arange(start, end, device=device)[:, None] - index).abs_()
        total += torch.bincount(distance.flatten(), summed.flatten(), n)
    return total


def _key_numbers(lead: torch.Size, of_keys: torch.Size, device: torch.device) -> Tensor:
    """Which row of the flattened keys each head of the queries reads: grouped heads share one."""
    numbers = torch.arange(of_keys.numel(), device=device).reshape(of_keys)
    if of_keys and lead[-1] != of_keys[-1] and of_keys[-1] != 1:
        numbers = numbers.repeat_interleave(lead[-1] // of_keys[-1], dim=-1)
    return numbers.expand(lead).reshape(-1)


def _unravelled(lead: torch.Size, device: torch.device) -> list[Tensor]:
    """For each leading dimension, the index of every head in it."""
    if not lead:
        return []
    grids = [torch.arange(size, device=device) for size in lead]
    return list(torch.meshgrid(*grids, indexing="ij"))
