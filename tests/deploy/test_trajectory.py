"""The Task's sampler in torch and in ONNX Runtime, and the region that spoils an image."""

from __future__ import annotations

import re

import torch

from graftc.deploy.directory import Export
from graftc.deploy.trajectory import check_trajectory
from graftc.emit.verify import random_inputs
from graftc.tasks import DDPM
from tests.deploy.test_export import spoil

TASK = DDPM(shape=(3, 8, 8), learned_variance=False, null_label=10)


def test_the_sample_is_the_same_step_by_step(exported, build):
    rungs = check_trajectory(exported("fp32"), build.student(), TASK, 3)
    assert {r.state for r in rungs} == {"PASS"}, rungs
    assert [r.name for r in rungs[:3]] == [f"trajectory, call {i}" for i in range(3)]
    assert "first in `blocks" in rungs[-1].detail


def test_the_region_that_spoils_the_image_is_named(copy, build):
    spoil(copy, "blocks.2.attn", lambda a: a * 1.5)
    rungs = check_trajectory(Export.open(copy), build.student(), TASK, 3)
    located = next(r for r in rungs if r.name == "trajectory, the first that is off")
    assert located.state == "FAIL"
    assert "call 0, region `blocks.2.attn" in located.detail
    assert "mix @ dit.graft:3" in located.detail


def test_a_task_that_does_not_sample_is_not_run(exported, build):
    class Other:
        def sample(self, model, *, count, generator):
            raise NotImplementedError("this task has no sampler")

    rungs = check_trajectory(exported("fp32"), build.student(), Other(), 3)
    assert [r.state for r in rungs] == ["NOT RUN"]


def test_a_sampler_that_fails_on_the_model_is_no_missing_sampler(exported, build):
    given = random_inputs(build.config(), build.student())(2, torch.Generator())

    class Fails:
        def sample(self, model, *, count, generator, steps):
            return model(**{**given, "x": given["x"][:, :1]})

    rungs = check_trajectory(exported("fp32"), build.student(), Fails(), 3)
    assert [r.state for r in rungs] == ["FAIL"]
    assert "captured at" in rungs[0].detail


def test_a_call_is_judged_on_torchs_input_and_not_on_what_came_before(exported, build):
    """Errors of halves add up over the steps: a later call on its own input is further off than the runtime is."""
    rungs = check_trajectory(exported("fp16"), build.student(), TASK, 6)
    calls = [r for r in rungs if "call" in r.name]
    assert {r.state for r in rungs} == {"PASS"}, rungs
    found = [[float(w) for w in re.findall(r"\d\.\de-\d+", r.detail)] for r in calls]
    assert found[0][0] == found[0][1]  # the same noise at first
    assert found[-1][1] > found[-1][0]
