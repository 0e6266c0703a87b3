"""Models that many tests share: built and captured once for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import pytest
import torch

from graftc.compiler import Compiled, compile_analysis
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model, load_model

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)
P = ParamSpec("P")
_analysed: dict[int, tuple[Model, Analysis]] = {}


def shared(make: Callable[P, Model]) -> Callable[P, Model]:
    """`make`, called once for the same arguments: for models that no test changes."""
    made: dict[str, Model] = {}

    @wraps(make)
    def once(*args: P.args, **given: P.kwargs) -> Model:
        key = repr((args, sorted(given.items())))
        if key not in made:
            made[key] = make(*args, **given)
        return made[key]

    return once


def compiled(rules: str | Path, model: Model) -> Compiled:
    """`compile_model`, with each model captured once for the whole run."""
    if id(model) not in _analysed:
        _analysed[id(model)] = model, analyse(capture(model))  # the model is kept, and so its id
    return compile_analysis(check(rules), _analysed[id(model)][1], model)


def small_dit(layers: int = 4) -> Model:
    """diffusers' DiT, small, with gates that are not zero (a fresh adaLN-zero block is the identity)."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_layers=layers,
        sample_size=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 5]),
    }
    return Model(
        module,
        inputs,
        meanings={"hidden_states": "noisy_latent", "timestep": "timestep", "class_labels": "label"},
    )


def small_pixart(layers: int = 4) -> Model:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    module = PixArtTransformer2DModel(
        num_layers=layers,
        sample_size=8,
        caption_channels=48,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 12, 48),
        "encoder_attention_mask": torch.ones(2, 12),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Model(module, inputs)


@pytest.fixture(scope="session")
def digits_model() -> Model:
    return load_model(f"{ROOT}/examples/digits/model.py:teacher")


@pytest.fixture(scope="session")
def digits(digits_model: Model) -> Analysis:
    return analyse(capture(digits_model))


@pytest.fixture(scope="session")
def dit_model() -> Model:
    return small_dit()


@pytest.fixture(scope="session")
def dit(dit_model: Model) -> Analysis:
    return analyse(capture(dit_model))


@pytest.fixture(scope="session")
def pixart_model() -> Model:
    return small_pixart()


@pytest.fixture(scope="session")
def pixart(pixart_model: Model) -> Analysis:
    return analyse(capture(pixart_model))
