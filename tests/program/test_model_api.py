"""`graftc.Model`: what a user can say of a model beside its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftc
from graftc.diagnostics import GraftError
from graftc.program.capture import capture


def test_meanings_are_checked() -> None:
    with pytest.raises(GraftError, match="noisy_latent"):
        graftc.Model(
            nn.Linear(2, 2), {"input": torch.ones(2, 2)}, meanings={"input": "noisy_latnet"}
        )
    with pytest.raises(GraftError, match="no input"):
        graftc.Model(nn.Linear(2, 2), {"input": torch.ones(2, 2)}, meanings={"x": "other"})


def test_other_dimensions_can_be_dynamic() -> None:
    model = graftc.Model(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        {"input": torch.zeros(2, 6, 4)},
        dynamic={"input": {0: "batch", 1: "tokens"}},
    )
    program = capture(model)
    assert program.inputs[0].shape == ("batch", "tokens", 4)
    assert program.root(torch.zeros(3, 9, 4))[0].shape == (3, 9, 4)


def test_a_batch_of_one_is_still_dynamic() -> None:
    program = capture(graftc.Model(nn.Sequential(nn.Linear(4, 4)), {"input": torch.zeros(1, 4)}))
    assert program.inputs[0].shape == ("batch", 4)
    assert program.root(torch.zeros(5, 4))[0].shape == (5, 4)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    program = capture(graftc.Model(Tied(), {"x": torch.zeros(2, 3, dtype=torch.long)}))
    embed, head = program.module("embed"), program.module("head")
    assert embed.weight is head.weight
