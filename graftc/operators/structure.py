"""Operators that compute nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Identity(nn.Module):
    """y = x.

    >>> Identity()(torch.ones(1, 2, 3)).sum()
    tensor(6.)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    """y = 0 of the shape of x: a residual branch that contributes nothing.

    >>> Zero()(torch.ones(1, 2, 3)).sum()
    tensor(0.)
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
