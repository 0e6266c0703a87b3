"""Models of several kinds, small, and operators like those that an edit brings in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.program.model import Model


class Block(nn.Module):
    """A block of the DiT kind (adaLN), with a fused qkv."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, 4)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU("tanh"), nn.Dropout(0.1), nn.Linear(2 * dim, dim)
        )
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, d, e, h = self.adaln(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + g * self.attn(self.norm1(x) * (1 + b) + a)
        return x + h * self.mlp(self.norm2(x) * (1 + e) + d)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(b, n, d))


class TinyDiT(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 2, stride=2)
        self.register_buffer("positions", torch.randn(1, 16, dim), persistent=False)
        self.labels = nn.Embedding(11, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 12)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rate = torch.exp(-math.log(100) * torch.arange(16, device=t.device) / 16)
        angle = t[:, None].float() * rate
        c = torch.cat([angle.cos(), angle.sin()], dim=-1).to(
            self.labels.weight.dtype
        ) + self.labels(y)
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        return self.head(x).transpose(1, 2).reshape(x.shape[0], 3, 8, 8)


class GPT(nn.Module):
    """Causal, with positions by `arange`, a mask in a buffer, and the head's weight tied to the table's."""

    def __init__(self, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(23, dim),
                "wpe": nn.Embedding(12, dim),
                "h": nn.ModuleList(GPTBlock(dim) for _ in range(depth)),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        self.lm_head = nn.Linear(dim, 23, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class GPTBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, bias=False)
        self.attn = MaskedAttention(dim)
        self.ln_2 = nn.RMSNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.relu(self.up(self.ln_2(x))) ** 2)


class MaskedAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.register_buffer("mask", torch.ones(12, 12).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).split(x.shape[-1], dim=-1)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~self.mask[:n, :n], float("-inf"))
        return scores.softmax(dim=-1) @ v


class Shared(nn.Module):
    """One MLP called twice and held under two names; a parameter of its own; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.again = self.first
        self.scale = nn.Parameter(torch.randn(8))
        self.fixed = nn.Parameter(torch.randn(()), requires_grad=False)
        self.register_buffer("steps", torch.arange(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.again(self.first(x)) * self.scale + self.fixed
        return y, y.lerp(x, 0.3) + self.steps


class TokenMixer(nn.Module):
    """An operator as graftc has them: a file-level helper, arguments that are not attributes."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(along_tokens(x, self.conv))


def along_tokens(x: Tensor, conv: nn.Conv1d) -> Tensor:
    left = conv.kernel_size[0] - 1
    return conv(F.pad(x.transpose(1, 2), (left, 0))).transpose(1, 2)


class Mean(nn.Module):
    """A merge of two branches."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2


def token_mixer(dim: int) -> TokenMixer:
    module = TokenMixer(dim)
    module.graft_arguments = {"dim": dim, "kernel": 3}
    return module


def tiny_dit() -> Model:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([3, 500]), "y": torch.tensor([1, 5])}
    return Model(TinyDiT().eval(), inputs, meanings={"t": "timestep", "y": "label"})


def gpt() -> Model:
    torch.manual_seed(1)
    return Model(GPT().eval(), {"tokens": torch.randint(0, 23, (2, 9))})


def shared() -> Model:
    torch.manual_seed(2)
    return Model(Shared().eval(), {"x": torch.randn(2, 8)})


class Mixer(nn.Module):
    """An operator without parameters, whose setting changes what it computes."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=self.causal)
