"""`graftc check-distill`: each site learns a few samples by heart, or the reason is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftc
from graftc.distillation.overfit import check_distill
from graftc.distillation.plain import Distillation
from graftc.distillation.targets import Budget
from tests.distillation import tiny
from tests.distillation.test_candidates import one_of


def checked(build, count: int = 2, steps: int = 400):
    return check_distill(Distillation(build, tiny.Denoise()), tiny.latents(), samples=count, steps=steps)  # fmt: skip


def test_sites_and_candidates_that_can_learn_pass(tmp_path):
    found = {c.name: c for c in checked(one_of(tmp_path))}
    assert set(found) == {"blocks.1.attn", "blocks.1.attn/1", "blocks.1.attn/3"}
    for check in found.values():
        assert check.passed, check.reason
        assert check.self_graft == 0  # the teacher's own region, with copied weights
        assert check.error_end < check.wanted


class Constant(nn.Module):
    """One number for all: far too little."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.bias.expand_as(x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(tiny.DIM, tiny.DIM)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.proj(x).detach() + 0 * self.scale


@pytest.mark.parametrize(
    ("operator", "reason"), [(Constant, "1 parameters for 256 numbers"), (Detached, "no gradient")]
)
def test_the_likely_reason_is_told(tmp_path, operator, reason):
    def student():
        model = tiny.teacher()
        model.blocks[1].attn = operator()
        return model

    site = tiny.attention_site(1, budget=Budget(steps=5))
    (check,) = checked(tiny.FakeBuild(tmp_path, tiny.targets(site), make_student=student), steps=30)
    assert not check.passed
    assert reason in check.reason


def test_a_zero_teacher_is_told(tmp_path):
    def teacher():
        model = tiny.teacher()
        nn.init.zeros_(model.blocks[1].attn.proj.weight)
        nn.init.zeros_(model.blocks[1].attn.proj.bias)
        return model

    build = tiny.FakeBuild(tmp_path, tiny.targets(tiny.attention_site(1)), make_teacher=teacher)
    (check,) = checked(build)
    assert "zero" in check.reason


def test_the_verb_is_public():
    assert graftc.check_distill is graftc.verbs.check_distill
