"""Which neurons of a narrower MLP stay: by their weights at once, by what they do as soon as there is data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graftc.verbs as verbs
from graftc.distillation.cuts import extract
from graftc.distillation.targets_file import from_dict
from graftc.distillation.teacher_parts import mlp_parts
from graftc.operators.mlp import Mlp
from graftc.program.model import Model
from graftc.weights.choose import solve_keep_top
from graftc.weights.fit import Block
from graftc.weights.parts import Affine

DIGITS = Path(__file__).parents[2] / "examples/digits"
MODEL, DATA = f"{DIGITS}/model.py:teacher", f"{DIGITS}/data.py:images"
RULES = """
rule thin {
    match   m = mlp in blocks {1}
    replace m with mlp(ratio = 2)
    init    keep_top(m, by = activation)
    distill l2
}
rule thin_and_fitted {
    match   m = mlp in blocks {3}
    replace m with mlp(ratio = 2)
    init    keep_top(m, by = activation)
            down = least_squares
    distill l2
}
"""


def _parts(module: Mlp) -> dict[str, Affine]:
    maps = {"up": module.fc1, "gate": module.gate, "down": module.fc2}
    return {n: Affine(m.weight.detach(), m.bias.detach()) for n, m in maps.items() if m is not None}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kept", [3, 5])
def test_neurons_that_never_fire_go_whatever_their_weights(gated, kept):
    """Five neurons of eight are at work; the others have larger weights, and a ReLU that is never above 0."""
    torch.manual_seed(0)
    teacher = Mlp(dim=4, ratio=2, activation="relu", gated=gated)
    silent = [1, 4, 6]
    with torch.no_grad():
        fires = teacher.fc1 if teacher.gate is None else teacher.gate
        fires.bias.fill_(2)
        fires.weight[silent], fires.bias[silent] = 9 * torch.rand(3, 4), -99
        x = torch.rand(2, 16, 7, 4)
        batches = [((a,), teacher(a)) for a in x]
    student = Mlp(dim=4, ratio=kept / 4, activation="relu", gated=gated)
    blocks = [Block("fc1", 0, kept), *([Block("gate", 0, kept)] if gated else [])]
    found = solve_keep_top(student, "fc2", blocks, _parts(teacher), batches)
    rows = [int((teacher.fc1.weight == row).all(1).nonzero()) for row in student.fc1.weight]
    assert not set(rows) & set(silent)
    if kept == 5:
        assert rows == [0, 2, 3, 5, 7]
        assert found.after < 1e-6 < found.before


def test_as_many_neurons_change_nothing():
    teacher, student = Mlp(dim=4, ratio=2), Mlp(dim=4, ratio=3)
    before = {n: p.clone() for n, p in student.state_dict().items()}
    x = torch.randn(2, 3, 4)
    solve_keep_top(student, "fc2", [Block("fc1", 0, 12)], _parts(teacher), [((x,), x)])
    assert all(torch.equal(p, before[n]) for n, p in student.state_dict().items())


def test_a_gate_that_has_no_place_is_refused():
    teacher, student = Mlp(dim=4, ratio=2, gated=True), Mlp(dim=4, ratio=1)
    with pytest.raises(ValueError, match="gated, and the operator is not"):
        solve_keep_top(student, "fc2", [Block("fc1", 0, 4)], _parts(teacher), [])


def test_the_plan_and_the_targets_say_that_it_waits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Of different widths, so that they are no chain of blocks.
    mlps = [nn.Sequential(nn.Linear(8, n), nn.GELU(), nn.Linear(n, 8)) for n in (32, 40)]
    model = Model(nn.Sequential(*mlps), {"input": torch.randn(2, 5, 8)})
    file = tmp_path / "thin.graft"
    rules = RULES.replace("mlp in blocks {1}", 'module "0"')
    file.write_text(rules.replace("mlp in blocks {3}", 'module "1"'))
    made = verbs.compile(file, model, tmp_path / "build")
    policies = {s["name"]: [p["policy"] for p in s["pending"]] for s in made.targets["sites"]}
    assert policies == {"0": ["keep_top"], "1": ["keep_top", "least_squares"]}
    teacher = extract(made.teacher(), from_dict(made.targets).sites[0].teacher)
    parts = mlp_parts(teacher, [torch.randn(2, 5, 8)])
    torch.testing.assert_close(parts["up"].weight, model.module.get_submodule("0.0").weight)


@pytest.mark.slow
def test_it_is_chosen_at_compile_time_or_before_stage_1(tmp_path: Path) -> None:
    """On the digits: without data by magnitude, until `distill` chooses; with data at once, and nearer."""
    file = tmp_path / "thin.graft"
    file.write_text(RULES)
    waits = verbs.compile(file, MODEL, tmp_path / "build")
    policies = {s["name"]: [p["policy"] for p in s["pending"]] for s in waits.targets["sites"]}
    assert list(policies.values()) == [["keep_top"], ["keep_top", "least_squares"]]
    chosen = verbs.compile(file, MODEL, tmp_path / "chosen", data=DATA)
    assert not any(s["pending"] for s in chosen.targets["sites"])

    torch.manual_seed(3)
    given = {"x": torch.randn(8, 1, 8, 8), "t": torch.full((8,), 700), "y": torch.arange(8)}
    with torch.no_grad():
        wanted = chosen.teacher().eval()(**given)
        errors = [(b.student().eval()(**given) - wanted).norm() for b in (waits, chosen)]
    assert errors[1] < 0.8 * errors[0]
    run = verbs.distill(waits, DATA, samples=256, batch=64, steps=0)
    assert run.sites[1].error_end < run.sites[0].error_end < 0.2
