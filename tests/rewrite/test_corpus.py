"""The corpus files of this version compile on models of their kind: 28 blocks, small width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftc.program.model import Model
from tests.conftest import compiled, small_dit, small_pixart

CORPUS = Path(__file__).parents[1] / "corpus"


@pytest.fixture(scope="session")
def dit28() -> Model:
    return small_dit(layers=28)


@pytest.fixture(scope="session")
def pixart28() -> Model:
    return small_pixart(layers=28)


@pytest.mark.parametrize(
    ("name", "kind", "edits"),
    [
        ("hyena_and_pairs", "dit28", 13 + 14),
        ("interleave_hyena_x", "dit28", 14),
        ("three_of_four_swa", "dit28", 21),
        ("mlp_ratio", "dit28", 28),
        ("depth_to_width", "dit28", 14),
        ("pixart_2k", "pixart28", 14),
    ],
)
def test_compiles(name: str, kind: str, edits: int, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(kind)
    made = compiled(CORPUS / f"{name}.graft", model)
    assert len(made.plan.edits) == edits
    assert len(made.targets.sites) == edits
    with torch.no_grad():
        given = [model.inputs[p.name] for p in made.teacher.inputs]
        wanted, found = made.teacher.root(*given)[0], made.student.root(*given)[0]
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    assert sum(p.numel() for p in made.student.root.parameters()) == made.plan.parameters[1]
