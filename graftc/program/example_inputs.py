"""Example inputs of a diffusers or transformers model, from its config.

By the names of forward's parameters and of the config's fields, which these libraries share
between architectures; there is no table of architectures. A parameter that nothing here knows and
that forward requires is an error, and a MODEL function is the way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import fail

BATCH = 2
TEXT = 16
"""Tokens of a text stream whose length the config does not say."""

MEANINGS = {
    "hidden_states": "noisy_latent",
    "timestep": "timestep",
    "class_labels": "label",
    "encoder_hidden_states": "caption_embedding",
    "encoder_attention_mask": "caption_mask",
    "input_ids": "tokens",
    "attention_mask": "attention_mask",
    "pixel_values": "image",
}

Config = Mapping[str, Any]


def example_inputs(module: nn.Module, config: Config, site: str) -> dict[str, Any]:
    """Inputs for `module.forward` at the config's own sizes, batch 2. Raises GraftError for an unknown one.

    >>> from torch import nn
    >>> class Text(nn.Module):
    ...     def forward(self, input_ids, attention_mask=None): ...
    >>> example_inputs(Text(), {"vocab_size": 9, "max_position_embeddings": 5}, "MODEL")["input_ids"].shape
    torch.Size([2, 5])
    """
    parameters = inspect.signature(module.forward).parameters
    main = str(getattr(module, "main_input_name", "") or "")
    context = {**config, "_parameters": tuple(parameters)}
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        required = parameter.default is parameter.empty or name == main
        make = BUILDERS.get(name)
        value = make(context) if make is not None else None
        if value is None and required:
            fail("G220", f"forward takes `{name}`, and the config does not say what that is",
                 site=site, wanted="an example input for it", found=", ".join(parameters),
                 help="write a function that returns `(module, {\"" + name + "\": …})` and give "
                      "-m file.py:function")  # fmt: skip
        if value is not None and (required or name in ALWAYS or name not in OPTIONAL):
            found[name] = value
    return found


def _grid(config: Config) -> tuple[int, int]:
    size = config.get("sample_size") or config.get("image_size") or 32
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    return int(config.get("sample_height") or size), int(config.get("sample_width") or size)


def _first(config: Config, *names: str) -> int | None:
    return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)


def _text_tokens(config: Config) -> int:
    return _first(config, "max_text_seq_length", "text_len") or TEXT


def _latent(config: Config) -> Tensor | None:
    channels = _first(config, "in_channels", "num_channels")
    if channels is None:
        return None
    height, width = _grid(config)
    if "img_ids" in config["_parameters"]:  # a packed sequence of patches with their positions
        return torch.randn(BATCH, prod(_positions(config)), channels)
    if "sample_frames" in config:  # video, frames before channels
        frames = (int(config["sample_frames"]) - 1) // int(config["temporal_compression_ratio"]) + 1
        return torch.randn(BATCH, frames, channels, height, width)
    if isinstance(config.get("patch_size"), (list, tuple)) and len(config["patch_size"]) == 3:
        return torch.randn(BATCH, channels, 2 * int(config["patch_size"][0]), height, width)
    return torch.randn(BATCH, channels, height, width)


def _positions(config: Config) -> tuple[int, int]:
    """Rows and columns of a packed sequence."""
    if config.get("sample_size"):
        height, width = _grid(config)
        return height // 2, width // 2
    return 8, 8


def _image_ids(config: Config) -> Tensor:
    rows, columns = _positions(config)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    return ids.reshape(-1, 3)


def _timestep(config: Config) -> Tensor:
    """Integers for a model of discrete steps, else real numbers below 1000."""
    if config.get("num_embeds_ada_norm") or "num_train_timesteps" in config:
        return torch.tensor([100, 700])
    return torch.tensor([100.0, 700.0])


def _caption(config: Config) -> Tensor | None:
    width = _first(config, "caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim",
                   "cap_feat_dim", "cross_attention_dim")  # fmt: skip
    return None if width is None else torch.randn(BATCH, _text_tokens(config), width)


def _caption_mask(config: Config) -> Tensor | None:
    caption = _caption(config)
    if caption is None:
        return None
    mask = torch.ones(caption.shape[:2])
    return mask.bool() if "cap_feat_dim" in config else mask


def _classes(config: Config) -> Tensor | None:
    return torch.tensor([1, 7]) if config.get("num_embeds_ada_norm") else None


def _pooled(config: Config) -> Tensor | None:
    width = _first(config, "pooled_projection_dim")
    return None if width is None else torch.randn(BATCH, width)


def _conditions(config: Config) -> dict[str, Any] | None:
    """PixArt's micro-conditions, unused unless the config asks for them."""
    if config.get("use_additional_conditions"):
        return {"resolution": torch.full((BATCH, 2), 1024.0), "aspect_ratio": torch.ones(BATCH, 1)}
    return {"resolution": None, "aspect_ratio": None}


def _tokens(config: Config) -> Tensor | None:
    vocabulary = _first(config, "vocab_size")
    if vocabulary is None:
        return None
    longest = _first(config, "max_position_embeddings", "n_positions", "n_ctx") or 64
    length = min(64, longest)
    return (torch.arange(BATCH * length) % vocabulary).reshape(BATCH, length)


def _sized(*fields: str) -> Callable[[Config], Tensor | None]:
    """Ones of [batch, those fields of the config], where it has them."""

    def make(config: Config) -> Tensor | None:
        sizes = [_first(config, f) for f in fields]
        return None if None in sizes else torch.ones(BATCH, *(s for s in sizes if s is not None))

    return make


def _rotary(config: Config) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines for each patch, where forward takes them and the config has a square patch."""
    patch, head = _first(config, "patch_size"), _first(config, "attention_head_dim")
    if patch is None or head is None or config.get("use_rotary_positional_embeddings") is False:
        return None
    height, width = _grid(config)
    angles = torch.arange(height * width // patch**2)[:, None] * torch.linspace(1, 0.01, head)
    return angles.cos(), angles.sin()


def _pixels(config: Config) -> Tensor | None:
    channels = _first(config, "num_channels")
    return None if channels is None else torch.randn(BATCH, channels, *_grid(config))


def _features(config: Config) -> Tensor | None:
    bins, frames = _first(config, "num_mel_bins"), _first(config, "max_source_positions")
    return None if bins is None or frames is None else torch.randn(BATCH, bins, 2 * frames)


def _no_cache(config: Config) -> bool | None:
    """A cache is state between calls: a captured graph has none."""
    return False if config.get("use_cache") is not None else None


BUILDERS: Mapping[str, Callable[[Config], Any]] = {
    "hidden_states": _latent,
    "timestep": _timestep,
    "class_labels": _classes,
    "encoder_hidden_states": _caption,
    "encoder_attention_mask": _caption_mask,
    "pooled_projections": _pooled,
    "img_ids": _image_ids,
    "txt_ids": lambda c: torch.zeros(_text_tokens(c), 3),
    "guidance": lambda c: torch.full((BATCH,), 3.5) if c.get("guidance_embeds") else None,
    "added_cond_kwargs": _conditions,
    "text_embedding_mask": _sized("text_len"),
    "encoder_hidden_states_t5": _sized("text_len_t5", "cross_attention_dim_t5"),
    "text_embedding_mask_t5": _sized("text_len_t5"),
    "image_meta_size": lambda c: torch.full((BATCH, 6), 1024.0),
    "style": lambda c: torch.zeros(BATCH, dtype=torch.long),
    "image_rotary_emb": _rotary,
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "use_cache": _no_cache,
}
"""Parameter of forward → its example, None where the config has no such input."""

OPTIONAL = frozenset({"input_ids", "pixel_values", "input_features"})
"""Given only where forward requires them or they are the model's main input."""

ALWAYS = frozenset({"use_cache"})
