"""Plain PyTorch models: attention in a block's own forward, opaque ops, long skips, shared blocks, convolutions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.program.model import Model
from tests.models.case import Case, unlike

DIM, HEADS = 32, 4


def tokens(count: int = 6) -> Tensor:
    return torch.randn(2, count, DIM)


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, dropout=0.0, batch_first=True)
    return Model(unlike(nn.TransformerEncoder(layer, 3)), {"src": tokens()})


class CausalSelfAttention(nn.Module):
    """As nanoGPT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.c_attn(x).split(DIM, dim=2)
        q, k, v = (t.view(b, n, HEADS, d // HEADS).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, n, d))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(DIM, 48), nn.GELU(), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(DIM), CausalSelfAttention()
        self.ln_2, self.mlp = nn.LayerNorm(DIM), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(40, DIM),
                "wpe": nn.Embedding(64, DIM),
                "h": nn.ModuleList(GPTBlock() for _ in range(3)),
                "ln_f": nn.LayerNorm(DIM),
            }
        )
        self.lm_head = nn.Linear(DIM, 40, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # tied

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        t = self.transformer
        x = t["wte"](idx) + t["wpe"](torch.arange(idx.shape[1], device=idx.device))
        for block in t["h"]:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(t["ln_f"](x)), None


def nanogpt() -> Model:
    return Model(
        unlike(NanoGPT()),
        {"idx": torch.randint(0, 40, (2, 7))},
        dynamic={"idx": {0: "batch", 1: "tokens"}},
    )


class EinsumBlock(nn.Module):
    """Attention and MLP written into the block's own forward, with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.to_out = nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, n, HEADS, -1) for f in (self.to_q, self.to_k, self.to_v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(DIM // HEADS)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        x = x + self.to_out(mixed.reshape(b, n, DIM))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def einsum() -> Model:
    return Model(
        unlike(Stack([EinsumBlock() for _ in range(3)])),
        {"x": tokens()},
        dynamic={"x": {0: "batch", 1: "tokens"}},
    )


def _opaque(name: str) -> torch.library.CustomOpDef:
    """A stand-in for an attention kernel that graftc cannot see into: [batch, tokens, heads, head_dim]."""

    @torch.library.custom_op(f"graftc_tests::{name}", mutates_args=())
    def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return y.transpose(1, 2).contiguous()

    @kernel.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return torch.empty_like(q)

    return kernel


flash_attn_func = _opaque("flash_attn_func")
memory_efficient_attention = _opaque("memory_efficient_attention")


class OpaqueAttention(nn.Module):
    def __init__(self, kernel: torch.library.CustomOpDef, causal: bool) -> None:
        super().__init__()
        self.kernel, self.causal = kernel, causal
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, d // HEADS).unbind(2)
        return self.proj(self.kernel(q, k, v, self.causal).reshape(b, n, d))


class OpaqueBlock(GPTBlock):
    def __init__(self, kernel: torch.library.CustomOpDef, causal: bool) -> None:
        super().__init__()
        self.attn = OpaqueAttention(kernel, causal)


def flash() -> Model:
    blocks = [OpaqueBlock(flash_attn_func, True) for _ in range(3)]
    return Model(unlike(Stack(blocks)), {"x": tokens()})


def xformers() -> Model:
    blocks = [OpaqueBlock(memory_efficient_attention, False) for _ in range(3)]
    return Model(unlike(Stack(blocks)), {"x": tokens()})


class SkipBlock(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), UViTAttention()
        self.norm2, self.mlp = nn.LayerNorm(DIM), MLP()
        self.skip_linear = nn.Linear(2 * DIM, DIM) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViTAttention(nn.Module):
    """With einops' layout, written out: softmax between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind()
        attn = (q @ k.transpose(-2, -1)) * (d // HEADS) ** -0.5
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, d))


class UViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 4, 4)
        self.time = nn.Sequential(nn.Linear(1, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.in_blocks = nn.ModuleList(SkipBlock(False) for _ in range(2))
        self.mid_block = SkipBlock(False)
        self.out_blocks = nn.ModuleList(SkipBlock(True) for _ in range(2))
        self.head = nn.Linear(DIM, 48)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        b = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.time(t[:, None].float())[:, None], x], dim=1)
        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.head(x)[:, 1:].view(b, 4, 4, 3, 4, 4)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, 16, 16)


def uvit() -> Model:
    return Model(unlike(UViT()), {"x": torch.randn(2, 3, 16, 16), "t": torch.tensor([0.1, 0.7])})


class ConvBlock(nn.Module):
    """A ConvNeXt block: a depthwise convolution, then an MLP on channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(DIM, DIM, 7, padding=3, groups=DIM)
        self.norm = nn.LayerNorm(DIM)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.mlp(y).permute(0, 3, 1, 2)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), nn.BatchNorm2d(DIM))
        self.blocks = nn.ModuleList(ConvBlock() for _ in range(3))
        self.norm, self.head = nn.GroupNorm(4, DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean((-2, -1)))


def convnet() -> Model:
    return Model(unlike(ConvNet()), {"x": torch.randn(2, 3, 16, 16)})


class SharedBlock(nn.Module):
    """One block run several times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = GPTBlock()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return self.norm(x)


def shared_block() -> Model:
    return Model(unlike(SharedBlock()), {"x": tokens()})


def shared_pair() -> Model:
    """Two blocks, each under two names of one list, in turn."""
    a, b = GPTBlock(), GPTBlock()
    return Model(unlike(Stack([a, b, a, b])), {"x": tokens()})


CASES = (
    Case("nn.TransformerEncoder", encoder, (3,), 3, mlp=3),
    Case("nanoGPT", nanogpt, (3,), 3, mlp=3, has={"causal"}),
    Case("einsum in the block", einsum, (3,), 3, mlp=3),
    Case("flash-attn (opaque op)", flash, (3,), 3, mlp=3),
    Case("xFormers (opaque op)", xformers, (3,), 3, mlp=3),
    Case("U-ViT", uvit, (3, 2), 5, mlp=5),
    Case("ConvNeXt-like", convnet, (3,), mlp=3),
    Case("one block three times", shared_block, (1,), 1, mlp=1, has={"causal"}),
    Case("two blocks twice", shared_pair, (2,), 2, mlp=2, has={"causal"}),
)  # fmt: skip
