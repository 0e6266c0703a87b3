"""A model in which nearly everything is nearly what a rule asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftc.program.model import Model

DIM, TOKENS = 16, 8


class Attention(nn.Module):
    def __init__(self, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (self.split(p) for p in (self.q(x), self.k(source), self.v(source)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, DIM // self.heads)).transpose(1, 2)


class KeylessAttention(Attention):
    """Its keys are a table: no linear makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(1, TOKENS, DIM))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys = self.keys.expand(x.shape[0], -1, -1)
        q, k, v = self.split(self.q(x)), self.split(keys), self.split(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, ratio: int = 4) -> None:
        super().__init__()
        self.up: nn.Module = nn.Linear(DIM, ratio * DIM)
        self.down = nn.Linear(ratio * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ConvMlp(Mlp):
    """Its first map is a convolution, not a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(DIM, 4 * DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)).transpose(1, 2)))


class NormMlp(Mlp):
    """Between its linears stands a norm, and no activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.layer_norm(self.up(x), (4 * DIM,)))


class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, crosses: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp, self.crosses = attn, mlp, crosses

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + (self.attn(y, context) if self.crosses else self.attn(y))
        return x + self.mlp(self.norm2(x))


class Odd(nn.Module):
    """`blocks`: 0 and 1 as usual; 2 has four heads; 3 no keys of its own; 4 a convolution in its MLP; 5 attends
    to the context and has no activation. `single`: three causal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                Block(Attention(), Mlp()),
                Block(Attention(), Mlp()),
                Block(Attention(heads=4), Mlp()),
                Block(KeylessAttention(), Mlp()),
                Block(Attention(), ConvMlp()),
                Block(Attention(), NormMlp(), crosses=True),
            ]
        )
        self.between = nn.Linear(DIM, DIM)
        self.single = nn.ModuleList(Block(Attention(causal=True), Mlp(ratio=2)) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, context)
        x = self.between(x)
        for block in self.single:
            x = block(x, context)
        return x


def odd() -> Model:
    torch.manual_seed(0)
    return Model(
        Odd().eval(),
        {"x": torch.randn(2, TOKENS, DIM), "context": torch.randn(2, 5, DIM)},
        dynamic={"x": {}, "context": {}},
    )
