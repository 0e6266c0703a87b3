"""The merges of branches that run in parallel on the same input.

A *site*'s output does not hold the residual stream, a *block*'s does: `SumMerge` is for sites,
`BlockSumMerge` for blocks, the others for both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SumMerge(nn.Module):
    """r1 + … + rk, for sites; each [batch, tokens, dim].

    >>> SumMerge()(torch.ones(1), torch.ones(1))
    tensor([2.])
    """

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = first + other
        return first


class BlockSumMerge(nn.Module):
    """x + Σ (rᵢ − x), for blocks, whose outputs rᵢ hold their input x; each [batch, tokens, dim].

    Layer parallelism (arXiv 2502.02790).

    >>> BlockSumMerge()(torch.ones(1), 2 * torch.ones(1), 3 * torch.ones(1))
    tensor([4.])
    """

    def forward(self, x: Tensor, *branches: Tensor) -> Tensor:
        y = x
        for branch in branches:
            y = y + (branch - x)
        return y


class LinearMerge(nn.Module):
    """proj([r1, …, rk]): a linear map of the concatenated outputs, each [batch, tokens, dim].

    (Grafting, arXiv 2506.05340, section 6: depth to width.)

    >>> LinearMerge(dim=4, branches=2)(torch.ones(1, 3, 4), torch.ones(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, dim: int, branches: int) -> None:
        super().__init__()
        if branches < 2:
            raise ValueError(f"merge = linear: {branches} branches, wanted at least 2")
        self.proj = nn.Linear(branches * dim, dim)

    def forward(self, *branches: Tensor) -> Tensor:
        return self.proj(torch.cat(branches, dim=-1))


class LerpMerge(nn.Module):
    """(1 − s) · r1 + s · r2, s a learned scalar that begins at `start`; each [batch, tokens, dim].

    (Control LLM, arXiv 2501.10979.)

    >>> LerpMerge(start=0.25)(torch.zeros(1), torch.ones(1)).item()
    0.25
    """

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(start)))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (1 - self.factor) * first + self.factor * second


class GateMerge(nn.Module):
    """Σ wᵢ rᵢ with w = softmax(gate([r1, …, rk])), of each token; each [batch, tokens, dim].

    With two branches w is a sigmoid. (Control LLM's dynamic lerp, arXiv 2501.10979.)

    >>> GateMerge(dim=4, branches=2)(torch.ones(1, 3, 4), torch.ones(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, dim: int, branches: int) -> None:
        super().__init__()
        if branches < 2:
            raise ValueError(f"merge = gate: {branches} branches, wanted at least 2")
        self.gate = nn.Linear(branches * dim, branches)

    def forward(self, *branches: Tensor) -> Tensor:
        weight = self.gate(torch.cat(branches, dim=-1)).softmax(dim=-1).unsqueeze(-2)
        return (torch.stack(branches, dim=-1) * weight).sum(dim=-1)
