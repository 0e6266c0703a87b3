"""MODEL functions for two diffusers transformers at their real configs, with random weights.

`graftc inspect` and `graftc plan` build them on the meta device: no weights, no memory.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

import graftc


def dit_xl2() -> graftc.Model:
    """DiT-XL/2 at 256 px: 28 blocks, 256 tokens (facebook/DiT-XL-2-256)."""
    return graftc.Model(
        DiTTransformer2DModel().eval(),
        {
            "hidden_states": torch.randn(2, 4, 32, 32),
            "timestep": torch.zeros(2, dtype=torch.long),
            "class_labels": torch.zeros(2, dtype=torch.long),
        },
        meanings={"hidden_states": "noisy_latent", "timestep": "timestep", "class_labels": "label"},
    )


def pixart_sigma_2k() -> graftc.Model:
    """PixArt-Sigma at 2048 px: 28 blocks, 16,384 image tokens, 300 of the caption."""
    module = PixArtTransformer2DModel(
        sample_size=256,
        interpolation_scale=4,
        caption_channels=4096,
        use_additional_conditions=False,
    ).eval()
    return graftc.Model(
        module,
        {
            "hidden_states": torch.randn(2, 4, 256, 256),
            "timestep": torch.zeros(2, dtype=torch.long),
            "encoder_hidden_states": torch.randn(2, 300, 4096),
            "encoder_attention_mask": torch.ones(2, 300),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        meanings={
            "hidden_states": "noisy_latent",
            "timestep": "timestep",
            "encoder_hidden_states": "caption_embedding",
            "encoder_attention_mask": "caption_mask",
        },
    )
