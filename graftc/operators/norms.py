"""Normalisation of each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """y = weight · x / √(mean(x²) + eps), token by token; x and y are [batch, tokens, dim].

    The mean is taken in float32 at least. Without `affine` there is no weight.
    (arXiv 1910.07467.)

    >>> RmsNorm(dim=2)(torch.tensor([1.0, 7.0])).mul(5).round().tolist()
    [1.0, 7.0]
    """

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"rms_norm: dim is {dim}, wanted at least 1")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = (wide * (wide.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)
        return y if self.weight is None else y * self.weight


class LayerNorm(nn.Module):
    """y = weight · (x − mean(x)) / √(var(x) + eps) + bias, token by token; [batch, tokens, dim].

    Without `affine` there are no weight and bias. (arXiv 1607.06450.)

    >>> LayerNorm(dim=2)(torch.tensor([3.0, 5.0])).round().tolist()
    [-1.0, 1.0]
    """

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"layer_norm: dim is {dim}, wanted at least 1")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
