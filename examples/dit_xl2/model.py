"""DiT in the layout of facebookresearch/DiT (Peebles & Xie 2023, arXiv 2212.09748): a released state dict loads as it is.

Names: `x_embedder.proj`, `t_embedder.mlp.0`, `y_embedder.embedding_table`, `blocks.N.attn.qkv`, `blocks.N.attn.proj`,
`blocks.N.mlp.fc1`, `blocks.N.adaLN_modulation.1`, `final_layer.linear`, and the fixed parameter `pos_embed`. `teacher` is
DiT-XL/2 at 256 pixels (latents of 32x32, patch 2: 256 tokens, width 1,152, 28 blocks, 16 heads, 675 M parameters).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import graftc

WEIGHTS = Path(__file__).with_name("DiT-XL-2-256x256.pt")
"""Where the released weights are looked for; the environment variable DIT_WEIGHTS names another file."""


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
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
    """Latent [B, C, H, W] -> tokens [B, N, D] in raster order."""

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
    """Noisy latent [B, C, H, W], timestep [B], label [B] -> [B, 2C, H, W]: noise and variance.

    >>> DiT(size=8, dim=32, depth=1, num_heads=2)(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.tensor([3])).shape
    torch.Size([1, 8, 8, 8])
    """

    def __init__(
        self,
        size: int = 32,
        patch: int = 2,
        channels: int = 4,
        dim: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_size = patch
        self.out_channels = 2 * channels
        self.grid = size // patch
        self.x_embedder = PatchEmbed(patch, channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(classes, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, dim), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        tokens = self.final_layer(tokens, condition)
        p, g, c = self.patch_size, self.grid, self.out_channels
        pixels = tokens.reshape(tokens.shape[0], g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(tokens.shape[0], c, g * p, g * p)


def teacher() -> graftc.Model:
    """MODEL: DiT-XL/2 with the released weights, from DIT_WEIGHTS or the file beside this one.

    `graftc inspect` and `plan` capture on the meta device and need no weights.
    """
    module = DiT().eval()
    if not module.pos_embed.is_meta:
        file = Path(os.environ.get("DIT_WEIGHTS", WEIGHTS))
        if not file.is_file():
            raise FileNotFoundError(
                f"no weights at {file}: put DiT-XL-2-256x256.pt of facebookresearch/DiT there, or name it in DIT_WEIGHTS"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(state.get("ema", state), strict=True)
    return describe(module)


def describe(module: DiT) -> graftc.Model:
    """A DiT of any size as a MODEL: its example inputs, what they mean, and its task (1,000 linear noise steps)."""
    import graftc
    from graftc.tasks import DDPM

    size, channels = module.grid * module.patch_size, module.out_channels // 2
    classes = module.y_embedder.embedding_table.num_embeddings - 1
    return graftc.Model(
        module=module,
        inputs={
            "x": torch.zeros(2, channels, size, size),
            "t": torch.zeros(2, dtype=torch.int64),
            "y": torch.zeros(2, dtype=torch.int64),
        },
        meanings={"x": "noisy_latent", "t": "timestep", "y": "label"},
        task=DDPM(shape=(channels, size, size), null_label=classes, label_dropout=0.1),
    )
