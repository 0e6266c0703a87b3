"""Small random diffusers transformers, each as its own class builds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftc.program.model import Model
from tests.models.case import Case, unlike

STREAMS = {"image": "hidden_states", "text": "encoder_hidden_states"}
TIME = torch.tensor([3.0, 500.0])


def dit() -> Model:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_layers=3,
        sample_size=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "class_labels": torch.tensor([1, 5]),
        },
    )


def pixart() -> Model:
    from diffusers import PixArtTransformer2DModel

    module = PixArtTransformer2DModel(
        num_layers=3,
        sample_size=8,
        caption_channels=48,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
    )
    mask = torch.ones(2, 12)
    mask[1, 7:] = 0
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(2, 12, 48),
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )


def sd3() -> Model:
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": TIME,
        },
        grid=(4, 4),
        streams=STREAMS,
    )


def flux() -> Model:
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    images = torch.zeros(16, 3)
    images[:, 1] = torch.arange(16) // 4
    images[:, 2] = torch.arange(16) % 4
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 16, 16),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": TIME / 1000,
            "img_ids": images,
            "txt_ids": torch.zeros(6, 3),
        },
        dynamic={
            n: {0: "batch"}
            for n in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        },
    )


def sana() -> Model:
    from diffusers import SanaTransformer2DModel

    module = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.tensor([3, 500]),
        },
    )


def hunyuan_dit() -> Model:
    from diffusers import HunyuanDiT2DModel

    module = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=32,
        pooled_projection_dim=20,
        text_len=6,
        text_len_t5=5,
        activation_fn="gelu-approximate",
        learn_sigma=True,
        use_style_cond_and_image_meta_size=False,
    )
    rotary = (torch.randn(16, 16), torch.randn(16, 16))
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "text_embedding_mask": torch.ones(2, 6),
            "encoder_hidden_states_t5": torch.randn(2, 5, 32),
            "text_embedding_mask_t5": torch.ones(2, 5),
            "image_rotary_emb": rotary,
        },
    )


def auraflow() -> Model:
    from diffusers import AuraFlowTransformer2DModel

    module = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": TIME / 1000,
        },
    )


def lumina2() -> Model:
    from diffusers import Lumina2Transformer2DModel

    module = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(40, 16, 16),
        cap_feat_dim=24,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": TIME / 1000,
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
        },
        fixed=("encoder_attention_mask",),  # its sums are lengths, and a loop runs over them
    )


def cogvideox() -> Model:
    from diffusers import CogVideoXTransformer3DModel

    module = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.tensor([3, 500]),
        },
        grid=(8, 4),  # two frames of 4 x 4, one below the other
        streams=STREAMS,
    )


def wan() -> Model:
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=48,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return Model(
        unlike(module),
        {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(2, 6, 20),
        },
    )


def _outputs(value: Any) -> Tensor:
    return value[0]


CASES = (
    Case("diffusers DiT", dit, chains=(3,), self_attention=3, mlp=3),
    Case("diffusers PixArt", pixart, chains=(3,), self_attention=3, cross_attention=3, mlp=3, has={"mask"}),
    Case("diffusers SD3", sd3, chains=(3,), joint_attention=3, mlp=5),
    Case("diffusers Flux", flux, chains=(2, 2), joint_attention=2, self_attention=2, mlp=4, has={"rotary", "qk_norm"}),
    Case("diffusers Sana", sana, chains=(3,), self_attention=3, cross_attention=3),
    Case("diffusers HunyuanDiT", hunyuan_dit, chains=(4,), self_attention=4, cross_attention=5, mlp=4, has={"rotary", "qk_norm"}),
    Case("diffusers AuraFlow", auraflow, chains=(2, 2), joint_attention=2, self_attention=2, mlp=6, gated=6, has={"qk_norm"}),
    Case("diffusers Lumina2", lumina2, chains=(2, 2, 3), self_attention=7, mlp=7, gated=7, has={"rotary", "groups", "qk_norm"}),
    Case("diffusers CogVideoX", cogvideox, chains=(3,), joint_attention=3, mlp=3, has={"qk_norm"}),
    Case("diffusers Wan", wan, chains=(3,), self_attention=3, cross_attention=3, mlp=3, has={"rotary", "qk_norm"}),
)  # fmt: skip
