"""What goes wrong in a run is told, the last checkpoint stays good, and a run that never began leaves no folder.

More of it: NaN of the teacher, constant and zero targets (`test_stage1.py`), shapes and names (`test_data.py`), a full
disk, two processes on one run, other options (`test_resume.py`), stale caches (`test_replay.py`), banks (`test_bank.py`).
"""

from __future__ import annotations

import json
import logging
import resource

import pytest
import torch
from torch import nn

from graftc.diagnostics import GraftError
from graftc.distillation import distill, finetune, plan_distill
from graftc.distillation.advice import stage2_advice
from graftc.distillation.checkpoint import load_tensors, save_tensors
from graftc.distillation.generation import Generation
from graftc.distillation.out_of_memory import is_out_of_memory
from graftc.distillation.run import finished, runs
from graftc.distillation.targets import Budget, Lora, Stage2
from tests.distillation import tiny

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


def build(path):
    sites = [tiny.attention_site(i, budget=Budget(steps=12, batch=8)) for i in (1, 2)]
    stage2 = Stage2(steps=12, batch=8, lr=1e-3, warmup=2, ema=0.9)
    return tiny.FakeBuild(path, tiny.targets(*sites, stage2=stage2))


def refused(call, *args, **options):
    with pytest.raises(GraftError) as raised:
        call(*args, **options)
    return raised.value.diagnostics[0]


def same_weights(one, two) -> bool:
    ours, theirs = load_tensors(one.weights)[0], load_tensors(two.weights)[0]
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- the disk --------------------------------------------------------------------------------


def test_a_disk_that_is_full_from_the_start_is_told_and_nothing_is_left(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        told = refused(distill, build(tmp_path), tiny.latents(), tiny.Denoise())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (told.code, "lock" in told.message) == ("G550", True)
    assert not list((tmp_path / "runs").iterdir())


def test_weights_can_be_read_by_whom_other_files_can_be(tmp_path):
    """safetensors makes a file for its owner alone."""
    save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(1)}, {})
    (tmp_path / "plain").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("w.safetensors", "plain")]
    assert modes[0] == modes[1]


# -- DATA ------------------------------------------------------------------------------------


def test_a_single_sample_is_trained_on_and_said_to_be(tmp_path):
    """In the plan, in both runs' results, and in the log before the first step."""
    made, data = build(tmp_path), tiny.latents()[:1]
    plan = plan_distill(made, data, tiny.Denoise())
    assert [d.code for d in plan.warnings] == ["G826", "G827"]
    assert [d["code"] for d in plan.to_dict()["warnings"]] == ["G826", "G827"]
    for stage in (distill, finetune):
        done = stage(made, data, tiny.Denoise())
        assert [line[:4] for line in done.warnings] == ["G826", "G827"]
        assert finished(tmp_path, done.id).warnings == done.warnings
        events = [json.loads(x) for x in (done.path / "log.jsonl").read_text().splitlines()]
        at = {e["event"]: i for i, e in reversed(list(enumerate(events)))}
        assert at["warning"] < at["step"]
    assert plan_distill(made, tiny.latents(), tiny.Denoise()).warnings == ()


class KeepsItsIterator:
    """An iterable that gives the same iterator each time: gone after one reading."""

    def __init__(self, samples):
        self.one = iter(samples)

    def __iter__(self):
        return self.one


class RunsDry:
    """An iterable whose samples are gone after `count`, in whatever reading."""

    def __init__(self, count):
        self.left, self.samples = count, tiny.latents(count)

    def __iter__(self):
        for sample in self.samples:
            if self.left == 0:
                return
            self.left -= 1
            yield sample


@pytest.mark.parametrize("train", [distill, finetune])
def test_data_that_can_be_read_once_is_refused_before_anything_is_written(tmp_path, train):
    data = KeepsItsIterator(tiny.latents(80))
    assert refused(train, build(tmp_path), data, tiny.Denoise()).code == "G523"
    assert not runs(tmp_path)


def test_data_that_runs_dry_leaves_a_checkpoint_to_resume(tmp_path):
    class Data:
        """Whole at first, as the held-out samples are read; then it ends within the first epoch."""

        def __init__(self, dry):
            self.dry, self.readings = dry, 0

        def __iter__(self):
            self.readings += 1
            samples = tiny.latents(200)
            yield from samples[:120] if self.dry and self.readings == 2 else samples
            if self.dry:
                raise OSError("connection lost")

    whole = distill(build(tmp_path / "a"), Data(False), tiny.Denoise(), stacked="never")
    made = build(tmp_path / "b")
    options = {"stacked": "never", "checkpoint_every": 1}
    told = refused(distill, made, Data(True), tiny.Denoise(), **options)
    assert (told.code, "connection lost" in told.message) == ("G527", True)
    facts = load_tensors(tmp_path / "b" / "runs" / "0001-distill" / "checkpoint.safetensors")[1]
    assert 0 < facts["state"]["step"] < 12
    resumed = distill(made, Data(False), tiny.Denoise(), resume="0001-distill")
    assert same_weights(resumed, whole)


def test_an_end_of_data_is_told_with_what_may_be_the_matter(tmp_path):
    told = refused(distill, build(tmp_path), RunsDry(70), tiny.Denoise())
    assert told.code == "G520"
    assert "begin anew" in str(told.help)


@pytest.mark.parametrize("train", [distill, finetune])
def test_a_run_that_is_refused_before_it_begins_leaves_no_folder(tmp_path, train):
    for data in ([], [{"latent": torch.zeros(3, 3)}] * 20):
        refused(train, build(tmp_path), data, tiny.Denoise())
    assert not runs(tmp_path)


def test_a_shape_that_the_model_does_not_take_is_told_by_name_and_without_noise(tmp_path, caplog):
    data = [{"latent": torch.zeros(2 * tiny.TOKENS, tiny.DIM)}] * 20
    with caplog.at_level(logging.ERROR):
        told = refused(plan_distill, build(tmp_path), data, tiny.Denoise())
    assert told.code == "G532"  # not G597, sizes that cannot be computed
    assert not caplog.records


def nan_at(*places, count=80):
    data = tiny.latents(count)
    for place in places:
        data[place] = {"latent": torch.full_like(data[place]["latent"], float("nan"))}
    return data


def test_stage_2_is_not_judged_by_a_number_that_is_none(tmp_path):
    told = refused(finetune, build(tmp_path), nan_at(*range(80)), tiny.Denoise())
    assert (told.code, told.found) == ("G840", "NaN or Inf in input `x`")
    assert "held-out batch 0" in told.message
    assert not runs(tmp_path)


def test_a_model_that_runs_away_is_told_and_its_checkpoint_stays(tmp_path):
    """The loss of the held-out samples is no number in the middle of a run, on inputs that are."""

    class Away(tiny.Denoise):
        measured = 0

        def loss(self, outputs, prepared):
            self.measured += not torch.is_grad_enabled()
            return super().loss(outputs, prepared) * (float("inf") if self.measured > 3 else 1.0)

    told = refused(finetune, build(tmp_path), tiny.latents(80), Away(), checkpoint_every=1)
    assert (told.code, told.found) == ("G840", "finite inputs")
    checkpoint = tmp_path / "runs" / "0001-finetune" / "checkpoint.safetensors"
    assert load_tensors(checkpoint)[1]["state"]["step"] > 0


# -- out of memory ---------------------------------------------------------------------------


def test_stage_1_out_of_memory_in_the_middle_of_a_run(tmp_path, monkeypatch):
    whole = distill(build(tmp_path / "a"), tiny.latents(), tiny.Denoise(), stacked="never")
    step = Generation._step

    def full(self, number, *rest):
        if number == 7:
            raise torch.OutOfMemoryError(CUDA)
        return step(self, number, *rest)

    made = build(tmp_path / "b")
    with monkeypatch.context() as patched:
        patched.setattr(Generation, "_step", full)
        told = refused(
            distill, made, tiny.latents(), tiny.Denoise(), stacked="never", checkpoint_every=1
        )
    assert (told.code, told.site) == ("G593", "blocks.1.attn")
    assert "as was predicted" in str(told.wanted)
    assert "the next smaller setting: --site-by-site" in str(told.help)
    resumed = distill(made, tiny.latents(), tiny.Denoise(), resume="0001-distill")
    assert same_weights(resumed, whole)


def test_what_torch_says_of_the_cpu_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**56)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))


def test_out_of_memory_while_the_plan_is_made_leaves_nothing(tmp_path):
    """The first step of all is the one that the plan times."""

    class Greedy(tiny.Mixer):
        def forward(self, x):
            if x.requires_grad or not isinstance(x, torch._subclasses.FakeTensor):
                raise torch.OutOfMemoryError(CUDA)
            return super().forward(x)

    def student():
        model = tiny.hyena()
        model.blocks[1].attn = Greedy()
        return model

    made = build(tmp_path)
    made.make_student = student
    told = refused(distill, made, tiny.latents(), tiny.Denoise(), announce=lambda plan: None)
    assert (told.code, told.found) == ("G593", CUDA)
    assert not runs(tmp_path)


class Full(tiny.Denoise):
    """A task whose loss has no memory left from the call number `at` on."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def loss(self, outputs, prepared):
        self.calls += torch.is_grad_enabled()
        if self.calls > self.at:
            raise torch.OutOfMemoryError(CUDA)
        return super().loss(outputs, prepared)


def test_stage_2_out_of_memory_is_told_and_resumed(tmp_path):
    whole = finetune(build(tmp_path / "a"), tiny.latents(), tiny.Denoise())
    made = build(tmp_path / "b")
    told = refused(finetune, made, tiny.latents(), Full(5), checkpoint_every=1)
    assert (told.code, told.site, told.found) == ("G593", "stage 2", CUDA)
    assert "--checkpointing" in str(told.help)
    resumed = finetune(made, tiny.latents(), tiny.Denoise(), resume="0001-finetune")
    assert same_weights(resumed, whole)


def test_each_smaller_setting_of_stage_2_is_told_in_turn():
    model = nn.Sequential(nn.ModuleList(nn.Linear(1000, 999) for _ in range(2)))
    settings = [
        (Stage2(), 64, "cpu", "--checkpointing"),
        (Stage2(checkpointing=True), 64, "cuda", "--precision bfloat16"),
        (Stage2(checkpointing=True, precision="bfloat16"), 64, "cuda", "--batch 32"),
        (Stage2(checkpointing=True), 1, "cpu", "lora(8)"),
        (Stage2(checkpointing=True, train=Lora(8)), 1, "cpu", "a machine with more memory"),
    ]
    for terms, batch, device, says in settings:
        wanted, help = stage2_advice(model, terms, batch, 8_000_000, device)
        assert says in help
        assert wanted.startswith(
            "40.00 MB"
        )  # 8 MB of weights; of those that train, 4 times as much more
