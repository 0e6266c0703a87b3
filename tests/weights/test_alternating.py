"""Alternating least squares: every map of an operator fitted in turn, without a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graftc.operators.build import build
from graftc.operators.specs import SPECS
from graftc.weights.alternating import solve_alternating
from graftc.weights.fit import Block
from graftc.weights.initialise import initialise
from graftc.weights.parts import Affine
from graftc.weights.solve import solve_least_squares

DIM = 8


def _operator(name: str, seed: int, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    return build(SPECS[name], {"dim": DIM, **arguments}).double()


def _batches(teacher: nn.Module, count: int = 2, tokens: int = 24):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 8, tokens, DIM, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return [((a,), teacher(a)) for a in x]


HYENAS = [("hyena_x", True), ("hyena_x", False), ("hyena_y", False), ("hyena_se", True)]


@pytest.mark.parametrize(("name", "causal"), HYENAS)
def test_maps_that_are_off_come_nearer_than_by_the_last_one_alone(name, causal):
    """Every weight before the last map moved by a third: fitting them all undoes most of it."""
    spec = SPECS[name]
    own = {"dim": DIM, "kernel": 3, "causal": causal}
    arguments = {a.name: own.get(a.name, a.default) for a in spec.args}
    part = Affine(torch.zeros(DIM, DIM))
    site = dict.fromkeys(("q", "k", "v", "out"), part)
    scratch = _operator(name, 2, kernel=3, causal=causal)
    origins = initialise(scratch, spec, arguments, "self_attention", (), {"site": site})
    (fit,) = {o.fit for o in origins if o.fit}

    def moved() -> nn.Module:
        module = _operator(name, 0, kernel=3, causal=causal)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for path, p in module.named_parameters():
                if path.startswith("out_proj"):
                    continue  # as where it is the teacher's own: what the others are fitted through
                p += p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3
        return module

    batches = _batches(_operator(name, 0, kernel=3, causal=causal))
    alone = solve_least_squares(moved(), "out_proj", batches)
    found = solve_alternating(moved(), "out_proj", fit.blocks, batches, sweeps=8)
    assert found.after < 0.5 * alone.after


@pytest.mark.parametrize("module", ["in_proj", "short_filter"])
def test_a_block_that_alone_is_wrong_is_found_again(module):
    """Linear in the block: one sweep over it gives the teacher's rows back, bias and boundary included."""
    teacher = _operator("hyena_x", 0, kernel=4, causal=True)
    student = _operator("hyena_x", 0, kernel=4, causal=True)
    with torch.no_grad():
        student.get_submodule(module).weight[DIM : 2 * DIM] = 0.5  # type: ignore[index]
    block = Block(module, DIM, 2 * DIM)
    batches = _batches(teacher)
    found = solve_alternating(student, "out_proj", [block], batches, sweeps=1, ridge=1e-12)
    assert found.after < 1e-5
    wanted, made = (m.get_submodule(module).weight for m in (teacher, student))
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)


def test_v_of_an_attention_is_fitted_row_by_row():
    arguments = {"heads": 2, "window": 3}
    teacher, student = (_operator("sliding_window", 0, **arguments) for _ in range(2))
    with torch.no_grad():
        student.in_proj.weight[2 * DIM :] = 0  # type: ignore[index]
    rows = [Block("in_proj", 2 * DIM, 3 * DIM)]
    batches = _batches(teacher)
    found = solve_alternating(student, "out_proj", rows, batches, sweeps=1, ridge=1e-12)
    assert found.after < 1e-5


def test_pieces_do_not_change_what_is_found(monkeypatch):
    teacher = _operator("hyena_x", 0, kernel=4, causal=True)
    made: list[torch.Tensor] = []
    for features in (2**25, 24 * DIM * DIM):
        monkeypatch.setattr("graftc.weights.alternating.FEATURES", features)
        student = _operator("hyena_x", 1, kernel=4, causal=True)
        solve_alternating(student, "out_proj", [Block("in_proj", 0, DIM)], _batches(teacher))
        made.append(student.in_proj.weight.detach())  # type: ignore[union-attr]
    torch.testing.assert_close(*made)


def test_rows_that_feed_other_channels_are_refused():
    teacher = _operator("hyena_x", 0, kernel=4, causal=True)
    with pytest.raises(ValueError, match="the block of in_proj has 4 rows"):
        solve_alternating(teacher, "out_proj", [Block("in_proj", 0, 4)], _batches(teacher))
    with pytest.raises(ValueError, match="is a TokenFilter"):
        solve_alternating(teacher, "short_filter", [], _batches(teacher))
