"""`graftc check-distill`: each site learns a few samples by heart, or the reason is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftc
from graftc.distillation.overfit import check_distill
from graftc.distillation.plain import Distillation
from graftc.distillation.targets import Budget, Loss, Site
from tests.distillation import tiny
from tests.distillation.test_candidates import one_of
from tests.distillation.test_stage1 import biased


def checked(build, count: int | None = 2, steps: int = 400):
    return check_distill(Distillation(build, tiny.Denoise()), tiny.latents(), samples=count, steps=steps)  # fmt: skip


def test_sites_and_candidates_that_can_learn_pass(tmp_path):
    found = {c.name: c for c in checked(one_of(tmp_path))}
    assert set(found) == {"blocks.1.attn", "blocks.1.attn/1", "blocks.1.attn/3"}
    for check in found.values():
        assert check.passed, check.reason
        assert check.self_graft == 0  # the teacher's own region, with copied weights
        assert check.loss_end < check.wanted == 0.01  # of the site's own loss
        assert check.loss_start > 0.5


def test_eight_samples_by_heart(tmp_path):
    """As many as the issue asks for: an operator with the same tokens in sight as the teacher's."""

    def student():
        model = tiny.hyena((1,))
        torch.manual_seed(1)
        model.blocks[1].attn = tiny.Attention()
        return model

    site = tiny.attention_site(1, loss=Loss("l2"))
    made = tiny.FakeBuild(tmp_path, tiny.targets(site), make_student=student)
    (check,) = checked(made, 8, 1000)
    assert (check.passed, check.samples, check.note) == (True, 8, ""), check
    (default,) = checked(made, None, 1)
    assert default.samples == 4  # 1,088 parameters, 128 numbers a sample: two for each


def test_a_site_with_too_few_parameters_is_checked_on_fewer_samples(tmp_path):
    site = tiny.attention_site(1, loss=Loss("l1"))  # 864 parameters, 128 numbers a sample
    made = tiny.FakeBuild(tmp_path, tiny.targets(site), make_student=lambda: tiny.hyena((1,)))
    (check,) = checked(made, None, 400)
    assert (check.passed, check.samples, check.rows) == (True, 3, 0), check
    assert check.note == "checked on 3 of them: 864 parameters, and 8 samples have 1,024 numbers"
    (forced,) = checked(made, 40, 10)
    assert (forced.passed, forced.samples, forced.note) == (False, 40, "")
    assert "too few to know them all by heart: 864 parameters for 5,120 numbers" in forced.reason


class Filter(nn.Module):
    """A filter of 3 taps for each channel along the tokens: 64 parameters beside 128 numbers of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(tiny.DIM, tiny.DIM, 3, padding=1, groups=tiny.DIM)

    def forward(self, x):
        return self.filter(x.transpose(1, 2)).transpose(1, 2)


class Blind(nn.Module):
    """It gives every token of every sample the same: its target is no function of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(tiny.DIM, tiny.DIM)

    def forward(self, x):
        return self.proj(0 * x)


def with_operator(tmp_path, operator):
    def student():
        model = tiny.teacher()
        torch.manual_seed(0)
        model.blocks[1].attn = operator()
        return model

    return tiny.FakeBuild(tmp_path, tiny.targets(tiny.attention_site(1)), make_student=student)


def test_a_site_with_too_few_parameters_for_one_sample_is_checked_on_rows_of_it(tmp_path):
    (check,) = checked(with_operator(tmp_path, Filter), None, 1000)
    assert (check.passed, check.samples, check.rows) == (True, 1, 2), check
    assert (
        "2 of 8 rows of one sample: 64 parameters, and 8 samples have 1,024 numbers" in check.note
    )


def test_a_site_that_cannot_see_what_its_target_hangs_on_fails(tmp_path):
    (check,) = checked(with_operator(tmp_path, Blind), None, 300)
    assert not check.passed
    assert check.samples == 1  # 272 parameters: one sample, on which it fails too
    assert "lacks an input" in check.reason
    assert check.loss_end > 0.1


class Biased(tiny.Attention):
    """An attention that takes a second value, as a causal mask, which the student's call has not."""

    def forward(self, x, bias):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))


class Block(nn.Module):
    def __init__(self, attn) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x, bias):
        return x + (self.attn(x, bias) if isinstance(self.attn, Biased) else self.attn(x))


class Masked(nn.Module):
    def __init__(self, attn) -> None:
        super().__init__()
        self.register_buffer("bias", torch.full((tiny.TOKENS, tiny.TOKENS), -9.0).triu(1))
        self.block = Block(attn)

    def forward(self, x, t):
        return self.block(x, self.bias)


def test_what_the_teacher_takes_and_the_student_does_not_is_no_fault_of_the_cut(tmp_path):
    torch.manual_seed(0)
    teacher, student = Masked(Biased()).eval(), Masked(tiny.Attention())
    student.block.attn.load_state_dict(teacher.block.attn.state_dict())
    cut = tiny.call("block.attn", "block")
    site = Site("block.attn", cut, cut, ("block.attn",))
    made = tiny.FakeBuild(
        tmp_path, tiny.targets(site), make_teacher=lambda: teacher, make_student=lambda: student
    )
    (check,) = checked(made, 2, 30)
    assert check.self_graft == 0
    assert check.loss_start > 0  # without the mask


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


def test_a_constant_teacher_is_told(tmp_path):
    build = tiny.FakeBuild(tmp_path, tiny.targets(tiny.attention_site(1)), make_teacher=biased)
    (check,) = checked(build)
    assert "the same for each of these samples" in check.reason


def test_a_student_of_another_shape_is_told(tmp_path):
    def student():
        model = tiny.teacher()
        model.blocks[1].attn = nn.Linear(tiny.DIM, 3)
        return model

    build = tiny.FakeBuild(tmp_path, tiny.targets(tiny.attention_site(1)), make_student=student)
    (check,) = checked(build)
    assert "[2, 8, 3], the teacher [2, 8, 16]" in check.reason


def test_the_verb_is_public():
    assert graftc.check_distill is graftc.verbs.check_distill


class Clean(tiny.Denoise):
    """A task without noise: a sample that comes twice is the same sample."""

    def prepare(self, sample, generator):
        x = sample["latent"]
        return tiny.Made({"x": x, "t": torch.zeros(len(x), dtype=torch.long)}, {"clean": x})


@pytest.mark.parametrize("count", [None, 3])
def test_data_of_one_sample_is_checked_on_that_sample_once(tmp_path, count):
    site = tiny.attention_site(1, loss=Loss("l1"))
    made = tiny.FakeBuild(tmp_path, tiny.targets(site), make_student=lambda: tiny.hyena((1,)))
    work = Distillation(made, Clean())
    (check,) = check_distill(work, tiny.latents(1), samples=count, steps=400)
    assert (check.passed, check.samples, check.rows) == (True, 1, 0), check
    assert check.note == f"DATA gives 1 different sample where {count or 8} are taken"
    work = Distillation(with_operator(tmp_path, Filter), Clean())
    (small,) = check_distill(work, tiny.latents(1), samples=None, steps=1000)
    assert (small.samples, small.rows) == (1, 2), small
    assert "64 parameters, and one sample has 128 numbers" in small.note
    assert "DATA gives 1 different sample where 8 are taken" in small.note


def test_samples_that_repeat_are_counted_once(tmp_path):
    made = tiny.FakeBuild(tmp_path, tiny.targets(tiny.attention_site(1)))
    data = tiny.latents(2)  # one of them is held out
    data = [*data, *data]
    (check,) = check_distill(Distillation(made, Clean()), data, samples=None, steps=1)
    assert check.note.startswith("DATA gives 2 different samples where 8 are taken")


def test_where_nothing_was_trained_no_part_of_the_samples_is_named(tmp_path):
    made = with_operator(tmp_path, Filter)

    def constant():
        model = tiny.teacher()
        model.blocks[1].attn.qkv.weight.data.zero_()
        model.blocks[1].attn.qkv.bias.data.fill_(1.0)
        return model

    made.make_teacher = constant
    (check,) = checked(made, None, 100)
    assert (check.passed, check.steps, check.samples, check.rows, check.note) == (
        False,
        0,
        8,
        0,
        "",
    )
    assert "the same for each of these samples" in check.reason
