"""What stage 2 is predicted to take before it starts, against what it does: bytes counted, not timed."""

from __future__ import annotations

import copy

import pytest

from graftc.cli.plans import show_stage2_plan
from graftc.diagnostics import GraftError
from graftc.distillation import finetune, plan_finetune
from graftc.distillation.resident import Allocator
from graftc.distillation.sizes import Live
from graftc.units import size_text
from tests.distillation import tiny

SITES = (tiny.attention_site(1), tiny.attention_site(3))
WAYS = {
    "whole": {},
    "checkpointed": {"checkpointing": True},
    "teacher and features": {"teacher": 1.0, "features": 1.0},
    "inserted": {"train": "inserted"},
    "adapters": {"train": "lora(2)"},
}


def build(path):
    """A build whose models are there before the run: the run's own bytes are what is counted."""
    path.mkdir(exist_ok=True)
    models = {"teacher": tiny.teacher(), "student": tiny.hyena((1, 3))}
    return tiny.FakeBuild(
        path,
        tiny.targets(*SITES),
        make_teacher=lambda: copy.deepcopy(models["teacher"]),
        make_student=lambda: models["student"],
    )


@pytest.mark.parametrize("way", WAYS)
def test_peak_memory_of_stage_2_is_predicted_within_a_fifth(tmp_path, way):
    data, given = tiny.latents(600), {"batch": 256, "steps": 3, "threads": 1}
    costs = plan_finetune(build(tmp_path / "a"), data, tiny.Denoise(), **given, **WAYS[way]).costs
    assert not (tmp_path / "a" / "runs").exists()
    options = {
        {"teacher": "teacher_weight", "features": "features_weight"}.get(n, n): v
        for n, v in WAYS[way].items()
    }
    with Live() as live:
        finetune(build(tmp_path / "b"), data, tiny.Denoise(), **given, **options)
    assert live.peak == pytest.approx(costs.peak(allocator=Allocator()) - costs.weights, rel=0.2)


def test_blocks_that_are_computed_again_take_less_and_the_plan_says_so(tmp_path, capsys):
    plan = plan_finetune(build(tmp_path), tiny.latents(80), tiny.Denoise(), batch=64, steps=3)
    costs = plan.costs
    assert costs.checkpointed.alive < 0.7 * costs.step.alive
    assert sum(plan.parts.values()) == plan.peak
    show_stage2_plan(plan)
    said = capsys.readouterr().out
    for word in (
        "weights",
        "moments",
        "average",
        "activations",
        "--checkpointing",
        size_text(plan.peak),
    ):
        assert word in said


def test_planning_leaves_the_model_and_the_run_as_they_were(tmp_path):
    data, given = tiny.latents(40), {"batch": 16, "steps": 4, "threads": 1}
    alone = finetune(build(tmp_path / "a"), data, tiny.Denoise(), **given)
    plans = []
    told = finetune(build(tmp_path / "b"), data, tiny.Denoise(), **given, announce=plans.append)
    assert plans[0].costs.steps == 4
    assert alone.weights.read_bytes()[-4096:] == told.weights.read_bytes()[-4096:]


def test_a_task_whose_sizes_hang_on_values_is_said_and_trains_all_the_same(tmp_path):
    class Looks(tiny.Denoise):
        def loss(self, outputs, prepared):
            return super().loss(outputs, prepared) * (2.0 if float(outputs.sum()) > 0 else 1.0)

    data, given = tiny.latents(40), {"batch": 16, "steps": 2}
    with pytest.raises(GraftError) as raised:
        plan_finetune(build(tmp_path / "a"), data, Looks(), **given)
    assert raised.value.diagnostics[0].code == "G841"
    done = finetune(
        build(tmp_path / "b"), data, Looks(), **given, announce=lambda plan: pytest.fail("no plan")
    )
    assert done.steps == 2
    assert "cannot be computed" in (done.path / "run.yaml").read_text()
