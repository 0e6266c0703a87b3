"""What stage 2 is predicted to take before it starts, against what it does: bytes counted, not timed."""

from __future__ import annotations

import copy
from dataclasses import replace
from inspect import signature
from itertools import count

import pytest
import torch

from graftc.cli.plans import show_stage2_plan
from graftc.diagnostics import GraftError
from graftc.distillation import finetune, plan_distill, plan_finetune, planner2
from graftc.distillation.resident import Allocator
from graftc.distillation.sizes import Live
from graftc.distillation.stage2_run import Stage2Run
from graftc.units import size_text
from tests.distillation import tiny

SITES = (tiny.attention_site(1), tiny.attention_site(3))
WAYS = {
    "whole": {},
    "checkpointed": {"checkpointing": True},
    "teacher and features": {"teacher_weight": 1.0, "features_weight": 1.0},
    "inserted": {"train": "inserted"},
    "adapters": {"train": "lora(2)"},
}


def build(path, change=lambda student: student):
    """A build whose models are there before the run: the run's own bytes are what is counted."""
    path.mkdir(exist_ok=True)
    models = {"teacher": tiny.teacher(), "student": change(tiny.hyena((1, 3)))}
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
    with Live() as live:
        finetune(build(tmp_path / "b"), data, tiny.Denoise(), **given, **WAYS[way])
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


def test_seconds_of_a_run_are_of_its_steps_with_their_updates_and_of_its_measurements(tmp_path):
    plan = plan_finetune(build(tmp_path), tiny.latents(40), tiny.Denoise(), batch=16, steps=100)
    assert plan.costs.update > 0
    costs = replace(plan.costs, seconds=3.0, update=1.0, held_out=20)
    # Ten measurements of two batches, each a third of a forward and backward pass.
    assert replace(plan, costs=costs).seconds == pytest.approx(100 * (3 + 1) + 20 / 3 * 3)


def test_an_update_is_timed_on_a_part_of_the_parameters_and_scaled_to_all(monkeypatch):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(10, 10)), torch.nn.Parameter(torch.randn(50, 6))]
    before = [p.detach().clone() for p in parameters]
    ticks = count()
    monkeypatch.setattr(planner2.time, "perf_counter", lambda: float(next(ticks)))
    assert planner2.update_seconds(parameters) == 1
    assert planner2.update_seconds(parameters, copied=4 * 200) == 2  # 200 of 400 numbers
    assert planner2.update_seconds(parameters, copied=4 * 50) == 8
    assert all(
        torch.equal(p, old) and p.grad is None for p, old in zip(parameters, before, strict=True)
    )


GIVEN = {"batch": 16, "steps": 4, "threads": 1}


def test_planning_leaves_the_model_and_the_generator_as_they_were(tmp_path):
    made = build(tmp_path, tiny.noisy)
    student = made.student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    plan_finetune(made, tiny.latents(40), tiny.Denoise(), **GIVEN)
    assert torch.equal(torch.get_rng_state(), state)
    assert student.state_dict().keys() == before.keys()
    assert [n for n, v in student.state_dict().items() if not torch.equal(v, before[n])] == []


def test_planning_stage_1_leaves_the_sites_and_the_generator_as_they_were(tmp_path):
    student = tiny.hyena((1,))
    student.blocks[1].attn = torch.nn.Sequential(student.blocks[1].attn, tiny.Noisy())
    site = tiny.targets(tiny.attention_site(1))
    teacher = tiny.teacher()
    made = tiny.FakeBuild(tmp_path, site, lambda: student, lambda: teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    plan_distill(made, tiny.latents(40), tiny.Denoise(), **GIVEN)
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, v in student.state_dict().items() if not torch.equal(v, before[n])] == []


def test_a_run_that_told_its_plan_ends_with_the_bytes_of_one_that_did_not(tmp_path):
    data = tiny.latents(40)
    alone = finetune(build(tmp_path / "a", tiny.noisy), data, tiny.Denoise(), **GIVEN)
    plans = []
    made = build(tmp_path / "b", tiny.noisy)
    told = finetune(made, data, tiny.Denoise(), **GIVEN, announce=plans.append)
    assert plans[0].costs.steps == 4
    assert alone.weights.read_bytes() == told.weights.read_bytes()


def test_planning_takes_the_options_of_finetune_and_no_other(tmp_path):
    planned, trained = signature(plan_finetune).parameters, signature(finetune).parameters
    of_a_run = {
        "tensorboard",
        "resume",
        "checkpoint_every",
        "parallel",
        "sources",
        "progress",
        "announce",
    }
    assert set(trained) - set(planned) == of_a_run
    assert all(trained[name].default == one.default for name, one in planned.items())
    with pytest.raises(TypeError, match="precison"):
        plan_finetune(build(tmp_path), tiny.latents(40), tiny.Denoise(), precison="bfloat16")


def test_every_option_of_planning_reaches_the_plan(tmp_path, monkeypatch):
    given = {"seed": 3, "steps": 5, "batch": 8, "lr": 0.5, "warmup": 2, "ema": 0.5, "clip": 2.0, "samples": 30,
             "task_weight": 0.5, "teacher_weight": 0.25, "features_weight": 0.75, "train": "inserted",
             "precision": "bfloat16", "checkpointing": True, "preview": 9}  # fmt: skip
    monkeypatch.setattr(
        Stage2Run, "planned", lambda self: vars(self.terms) | {"seed": self.seed, "plan": self.plan}
    )
    seen = plan_finetune(build(tmp_path), tiny.latents(40), tiny.Denoise(), **given)
    plan = seen["plan"]
    assert (plan.steps, plan.batch, plan.lr) == (5, 8, 0.5)
    for name, value in given.items():
        if name not in ("steps", "batch", "lr"):
            assert seen[name.removesuffix("_weight")] == value, name


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
