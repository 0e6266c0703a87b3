"""Small models with something to rewrite in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graftc.program.model import Model


class Stack(nn.Sequential):
    """Modules one after the other; its input is called `x`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Attention(nn.Module):
    """Attention written out, q, k and v by linears of their own."""

    def __init__(self, dim: int = 16, heads: int = 2, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        parts = (
            f(x).view(b, n, self.heads, d // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        q, k, v = parts
        p = torch.softmax(q @ k.transpose(-1, -2) * (1 / math.sqrt(d // self.heads)), dim=-1)
        return self.out((p @ v).transpose(1, 2).reshape(b, n, d))


class Leaky(Attention):
    """Uses its attention map once more."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        p = torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1)
        return self.out(p @ v) + p.sum()


class WrittenNorm(nn.Module):
    """LayerNorm in single ops."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)
        self.bias = nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        var = centred.pow(2).mean(-1, keepdim=True)
        return centred * torch.rsqrt(var + 1e-5) * self.weight + self.bias


class WrittenRms(nn.Module):
    """RMSNorm in single ops, as transformers' Llama has it."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        var = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(var + 1e-6))


class WrittenGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class WrittenGeluTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class WrittenSilu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Back(nn.Module):
    """Gives its input back, after some detours."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.neg(torch.neg(x.transpose(0, 1).transpose(0, 1))) * 2


class Scaled(nn.Module):
    """A linear or convolution and a scale of each channel after it."""

    def __init__(self, inner: nn.Module, *shape: int) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Block(nn.Module):
    """x + part(norm(x))."""

    def __init__(self, part: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.part = norm, part

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(self.norm(x))


def model(module: nn.Module, *shape: int) -> Model:
    """The module with random weights and one input, by default [2, 5, 16]."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return Model(module.eval(), {"x": torch.randn(*(shape or (2, 5, 16)))})
