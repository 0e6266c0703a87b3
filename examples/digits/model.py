"""A diffusion transformer of the DiT kind (Peebles & Xie 2023, arXiv 2212.09748), small enough for one CPU core.

Names and layout are those of facebookresearch/DiT, so rules written for DiT-XL/2 match this model unchanged:
`blocks.N.attn.qkv`, `blocks.N.mlp.fc1`, `blocks.N.adaLN_modulation`, … Here: 8x8 images, patch 1, so 64 tokens; width 64,
depth 8, 4 heads, 0.6 M parameters; noise and variance predicted (2 channels out); label 10 is "no label".
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import graftc
    from graftc.tasks import DDPM

WEIGHTS = Path(__file__).with_name("teacher.safetensors")


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between them. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens [B, N, D] by vectors [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-zero conditioning: tokens [B, N, D] and condition [B, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PatchEmbed(nn.Module):
    """Image [B, C, H, W] -> tokens [B, N, D] in raster order."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timestep [B] -> vector [B, D], by sinusoids and an MLP."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rate = torch.exp(
            -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        )
        angle = t[:, None].float() * rate[None]
        wave = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        return self.mlp(wave.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Label [B] in 0..classes -> vector [B, D]; index `classes` is the null label of classifier-free guidance."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Tokens [B, N, D] and condition [B, D] -> pixels of each patch [B, N, patch * patch * C]."""

    def __init__(self, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Noisy image [B, C, H, W], timestep [B], label [B] -> [B, 2C, H, W]: noise, and variance as in improved-diffusion.

    >>> DiT()(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10])).shape
    torch.Size([2, 2, 8, 8])
    """

    def __init__(
        self,
        size: int = 8,
        patch: int = 1,
        channels: int = 1,
        dim: int = 64,
        depth: int = 8,
        num_heads: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patch_size = patch
        self.out_channels = 2 * channels
        self.grid = size // patch
        self.x_embedder = PatchEmbed(patch, channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(classes, dim)
        self.register_buffer("pos_embed", position_embedding(dim, self.grid).unsqueeze(0))
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch, self.out_channels)
        self._initialize()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        p, g, c = self.patch_size, self.grid, self.out_channels
        pixels = tokens.reshape(tokens.shape[0], g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(tokens.shape[0], c, g * p, g * p)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1)
        )
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the model starts by predicting nothing.
        for layer in (
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def position_embedding(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine and cosine table [grid * grid, dim], raster order; the first half of the channels encodes the column."""
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), rate)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis.repeat(grid, 1)
    row = axis.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()


def task() -> DDPM:
    """What the teacher was trained for: 1,000 steps of linear noise, learned variance, a tenth of the labels dropped.

    The last beta is 0.015, not the 0.02 of 256-pixel models: at 8x8 that already leaves 0.01 nats of the image at t = 999, and
    the steps saved are spent where a digit is still to be seen.
    """
    from graftc.tasks import DDPM

    return DDPM(
        shape=(1, 8, 8),
        schedule="linear",
        beta_end=0.015,
        null_label=10,
        label_dropout=0.1,
        levels=17,
        clip=True,
    )


def teacher() -> graftc.Model:
    """The MODEL function of this example: the trained teacher, its example inputs, what they mean, and its task.

    Weights come from `teacher.safetensors`, unless the module is built under `torch.device("meta")`.
    """
    import graftc

    module = DiT().eval()
    if not module.pos_embed.is_meta:
        load(module, WEIGHTS)
    batch = 2
    return graftc.Model(
        module=module,
        inputs={
            "x": torch.zeros(batch, 1, 8, 8),
            "t": torch.zeros(batch, dtype=torch.int64),
            "y": torch.zeros(batch, dtype=torch.int64),
        },
        meanings={"x": "noisy_latent", "t": "timestep", "y": "label"},
        task=task(),
    )


def load(module: nn.Module, path: Path) -> None:
    """Read safetensors weights into `module` in place; a missing or a left-over name is an error."""
    from safetensors.torch import load_file

    module.load_state_dict(load_file(path), strict=True)
