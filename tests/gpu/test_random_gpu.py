"""On a GPU: what dropout draws there is a function of seed and step; run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import os

import pytest
import torch

from graftc.distillation.scopes import random_of

DEVICE = os.environ.get("GRAFTC_GPU", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", [DEVICE, f"{DEVICE}:0"])
def test_dropout_draws_the_same_at_a_step_and_the_generator_is_put_back(name):
    x = torch.ones(64, 64, device=name)

    def dropped(step):
        with random_of(0, "stage2", step, device=name):
            return torch.nn.functional.dropout(x, 0.5)

    torch.manual_seed(1)
    undisturbed = torch.rand(8, device=name)
    torch.manual_seed(1)
    first, other = dropped(1), dropped(2)
    assert torch.equal(torch.rand(8, device=name), undisturbed)
    torch.rand(7, device=name)
    assert torch.equal(dropped(1), first)
    assert not torch.equal(first, other)
