"""Stage 2: the whole model on the task's loss; averages, warm-up, adapters, and the teacher too."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graftc.diagnostics import Diagnostic, GraftError, NotRunError
from graftc.distillation import distill, finetune, finetune_module
from graftc.distillation.optim import Schedule
from graftc.distillation.targets import Budget, Lora, Stage2
from tests.distillation import tiny

TERMS = Stage2(steps=40, batch=16, lr=5e-3, warmup=4, ema=0.9)


def build(path, **terms):
    from dataclasses import replace

    sites = [tiny.attention_site(i, budget=Budget(steps=5)) for i in (1, 2)]
    return tiny.FakeBuild(path, tiny.targets(*sites, stage2=replace(TERMS, **terms)))


def run(made, **options):
    return finetune(made, tiny.latents(), tiny.Denoise(), **options)


def log(result):
    return [json.loads(line) for line in (result.path / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_weights_load_into_the_student(tmp_path):
    made = build(tmp_path)
    result = run(made)
    assert result.id == "0001-finetune"
    assert result.metrics["loss_end"] < 0.9 * result.metrics["loss_start"]
    assert made.student(result.id)(**one_batch()).shape == (2, tiny.TOKENS, tiny.DIM)
    steps = [e["step"] for e in log(result) if e["event"] == "step"]
    assert steps == [*range(41), 40]  # held-out losses at the start and at the end beside the steps
    assert [e for e in log(result) if "held_out" in e and e["event"] == "step"]


def one_batch():
    return {"x": torch.randn(2, tiny.TOKENS, tiny.DIM), "t": torch.tensor([1, 2])}


def test_it_starts_from_the_newest_stage_1_or_from_what_is_named(tmp_path):
    made = build(tmp_path)
    for seed in (0, 1):
        distill(made, tiny.latents(), tiny.Denoise(), batch=8, seed=seed)
    newest, first, bare = (run(made, run=r, steps=1) for r in (None, "0001-distill", "untrained"))
    starts = [r.metrics["loss_start"] for r in (newest, first, bare)]
    assert len(set(starts)) == 3
    import yaml

    parents = [yaml.safe_load((r.path / "run.yaml").read_text())["parent"] for r in (newest, first)]
    assert parents == ["0002-distill", "0001-distill"]
    with pytest.raises(GraftError) as raised:
        run(made, run="0001-distil")
    assert "write `0001-distill`" in str(raised.value)


def test_the_teacher_is_given_the_same_stage_2(tmp_path):
    result = run(build(tmp_path), model="teacher")
    assert result.stage == "teacher"
    assert result.weights.name == "teacher.safetensors"
    assert result.metrics["loss_end"] < result.metrics["loss_start"]
    start, end = tiny.teacher().state_dict(), load_file(result.weights)
    assert start.keys() == end.keys()
    assert not torch.equal(start["head.weight"], end["head.weight"])


def test_the_weights_are_the_average_of_the_steps():
    module = nn.Linear(1, 1, bias=False)
    seen = [float(module.weight.detach())]

    def note(*_):
        seen.append(float(module.weight.detach()))

    terms = Stage2(steps=20, batch=4, lr=0.1, ema=0.5, warmup=0)
    finetune_module(module, Slope(), numbers(), stage2=terms, progress=note)
    average = seen[0]
    for step, weight in enumerate(seen[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert abs(float(module.weight.detach()) - average) < 1e-6
    assert abs(average - seen[-1]) > 1e-5


class Slope:
    """y = 3 x."""

    def prepare(self, sample, generator):
        return tiny.Made({"input": sample["x"]})

    def loss(self, outputs, prepared):
        return (outputs - 3 * prepared.inputs["input"]).square().mean()

    def metrics(self, outputs, prepared):
        return {}


def numbers():
    return [{"x": torch.tensor([i / 10])} for i in range(20)]


def test_without_an_average_the_weights_are_the_last():
    module = nn.Linear(1, 1)
    done = finetune_module(
        module, Slope(), numbers(), stage2=Stage2(steps=50, batch=8, lr=0.1, ema=0.0)
    )
    assert done.loss_end == done.loss_raw < 0.1 * done.loss_start


def test_the_rate_rises_stays_and_halves():
    schedule = Schedule(total=100, warmup=4, shape="constant", halve_at=(50, 80))
    rates = [schedule(step) for step in (0, 1, 3, 4, 49, 50, 79, 80, 99)]
    assert rates == [0.25, 0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def changed(result, made):
    start, end = made.student().state_dict(), load_file(result.weights)
    return {n for n in start if not torch.equal(start[n], end[n])}


def test_only_what_was_inserted_is_trained(tmp_path):
    made = build(tmp_path, train="inserted")
    names = changed(run(made), made)
    assert names
    assert all(n.startswith(("blocks.1.attn.", "blocks.2.attn.")) for n in names)


def test_adapters_are_merged_into_plain_weights(tmp_path):
    made = build(tmp_path, train=Lora(2))
    result = run(made)
    assert load_file(result.weights).keys() == made.student().state_dict().keys()
    linear = {f"{n}.weight" for n, m in made.student().named_modules() if isinstance(m, nn.Linear)}
    assert changed(result, made) == linear
    assert result.metrics["loss_end"] < result.metrics["loss_start"]
    student = made.student(result.id).eval()
    again = finetune_module(student, tiny.Denoise(), tiny.latents(), stage2=TERMS, steps=1)
    assert abs(again.loss_start - result.metrics["loss_end"]) < 1e-5


def test_adapters_without_peft_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(NotRunError) as raised:
        run(build(tmp_path, train=Lora(2)))
    assert raised.value.exit_code == 3
    assert "graftc[train]" in str(raised.value)


def test_steps_without_a_finite_gradient_are_skipped_then_refused():
    class Breaks(Slope):
        calls = 0

        def __init__(self, bad):
            self.bad = bad

        def loss(self, outputs, prepared):
            if outputs.requires_grad:
                self.calls += 1
            broken = outputs.requires_grad and self.bad(self.calls)
            return super().loss(outputs, prepared) * (float("inf") if broken else 1.0)

    module, terms = nn.Linear(1, 1), Stage2(steps=30, batch=8, lr=0.1, ema=0.0)
    done = finetune_module(module, Breaks(lambda n: n in (3, 9)), numbers(), stage2=terms)
    assert done.skipped_steps == 2
    assert torch.isfinite(module.weight).all()
    with pytest.raises(GraftError) as raised:
        finetune_module(module, Breaks(lambda _: True), numbers(), stage2=terms)
    assert raised.value.diagnostics[0].code == "G545"


def test_flags_and_mode_are_given_back():
    module = tiny.teacher()
    module.head.weight.requires_grad_(False)
    fixed = module.head.weight.clone()
    finetune_module(module, tiny.Denoise(), tiny.latents(), stage2=TERMS, steps=2)
    assert torch.equal(module.head.weight, fixed)
    assert not module.training
    assert not module.head.weight.requires_grad
    assert module.head.bias.requires_grad


def test_weights_of_another_student_are_told(tmp_path):
    made = build(tmp_path)
    distill(made, tiny.latents(), tiny.Denoise(), batch=8, steps=1)
    made.make_student = tiny.paired
    with pytest.raises(GraftError) as raised:
        run(made)
    assert raised.value.diagnostics[0].code == "G566"


def test_inputs_are_checked_here_too(tmp_path):
    class Swapped(tiny.Denoise):
        def prepare(self, sample, generator):
            made = super().prepare(sample, generator)
            return tiny.Made({"x": made.inputs["x"], "time": made.inputs["t"]})

    with pytest.raises(GraftError) as raised:
        finetune(build(tmp_path), tiny.latents(), Swapped())
    assert raised.value.diagnostics[0].code == "G530"


class Faulty(Slope):
    """A Task that fails in one of its methods, from its loss's call `after` on."""

    def __init__(self, error=None, after=0, returned=None):
        self.error, self.left, self.returned = error, after, returned

    def loss(self, outputs, prepared):
        self.left -= 1
        if self.left >= 0:
            return super().loss(outputs, prepared)
        if self.error is not None:
            raise self.error
        return self.returned


@pytest.mark.parametrize("after", [0, 1])  # on held-out samples, in a step
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"error": KeyError("target")}, "TASK raised KeyError: 'target'"),
        ({"returned": 0.5}, "`loss` returned float"),
        ({"returned": torch.ones(3)}, "`loss` returned [3] float32"),
    ],
)
def test_a_loss_that_fails_is_told(after, given, told):
    with pytest.raises(GraftError) as raised:
        finetune_module(
            nn.Linear(1, 1),
            Faulty(after=after, **given),
            numbers(),
            stage2=Stage2(steps=3, batch=4),
        )
    (found,) = raised.value.diagnostics
    assert (found.code, found.site) == ("G203", "TASK.loss")
    assert told in found.message
    if "error" in given:
        assert "raise self.error" in found.notes[0].message


def test_a_diagnostic_from_a_task_stays_as_it_is():
    error = GraftError(Diagnostic("G900", "told already"))
    with pytest.raises(GraftError) as raised:
        finetune_module(nn.Linear(1, 1), Faulty(error), numbers(), stage2=Stage2(steps=1, batch=4))
    assert raised.value is error


def test_an_error_of_what_prepare_made_is_told():
    class Odd(Slope):
        def prepare(self, sample, generator):
            return sample

    with pytest.raises(GraftError) as raised:
        finetune_module(nn.Linear(1, 1), Odd(), numbers(), stage2=Stage2(steps=1, batch=4))
    assert raised.value.diagnostics[0].site == "TASK.prepare"
