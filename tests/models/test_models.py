"""Five models of different kinds through the whole matrix; `make matrix` runs them all."""

from __future__ import annotations

import pytest

from tests.models.matrix import COLUMNS, row
from tests.models.zoo import CASES

KINDS = (
    "nanoGPT",  # causal, tied weights, a tuple with None
    "nn.TransformerEncoder",  # an MLP without a module
    "einsum in the block",  # neither has a module
    "ConvNeXt-like",  # no attention
    "transformers ViT",  # a library's own classes
)


@pytest.mark.parametrize("name", KINDS)
def test_everything_works(name: str) -> None:
    result = row(next(c for c in CASES if c.name == name))
    assert {c: d for c, (state, d) in result.cells.items() if state == "no"} == {}
    assert set(result.cells) == set(COLUMNS)
