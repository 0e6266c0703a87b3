"""A run that is killed and resumed ends with the bits of one that was not; what is written is whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftc.diagnostics import GraftError
from graftc.distillation import distill, finetune, runs
from graftc.distillation.checkpoint import load_tensors, save_tensors
from graftc.distillation.run import digest_of, open_run
from graftc.distillation.targets import Budget, Lora, Stage2
from tests.distillation import tiny

SITES = (
    tiny.attention_site(1, budget=Budget(steps=9), solve=True),
    tiny.attention_site(2, budget=Budget(steps=13)),
    tiny.pair_site(after=("blocks.2.attn",), budget=Budget(steps=8)),
)
TRAINS = {
    "all": Stage2(steps=24, batch=8, lr=1e-2, warmup=4, ema=0.9, halve_lr_at=(15,)),
    "inserted": Stage2(steps=24, batch=8, lr=1e-2, ema=0.9, train="inserted"),
    "lora": Stage2(steps=24, batch=8, lr=1e-2, ema=0.9, train=Lora(2)),
}


class Killed(Exception):
    pass


def build(path, train="all"):
    path.mkdir(exist_ok=True)
    targets = tiny.targets(*SITES, stage2=TRAINS[train])
    return tiny.FakeBuild(path, targets, make_student=lambda: tiny.paired((1, 2)))


def killer(at):
    """A progress callback that ends the run after so many calls."""
    calls = 0

    def progress(*_):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed

    return progress


def stage1(made, **options):
    # `stacked = "auto"` decides by time: two runs may differ by rounding. One run does not, see below.
    options = {"batch": 8, "checkpoint_every": 3, "optimiser": "muon", "stacked": "never"} | options
    return distill(made, tiny.latents(40), tiny.Denoise(), **options)


def stage2(made, **options):
    return finetune(made, tiny.latents(40), tiny.Denoise(), checkpoint_every=5, **options)


def story(result):
    """Everything a run says, but for the time it took."""
    lines = (result.path / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same(one, other):
    ours, theirs = load_file(one.weights), load_file(other.weights)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert one.sites == other.sites
    assert dict(one.metrics) == dict(other.metrics)
    assert story(one) == story(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Stage 1 without interruption."""
    torch.set_num_threads(1)
    return stage1(build(tmp_path_factory.mktemp("whole")))


# Progress is called once for the solve, 13 times in the first generation, 8 times in the second.
@pytest.mark.parametrize("at", [1, 2, 5, 10, 14, 15, 21])
def test_stage_1_killed_and_resumed(tmp_path, whole, at):
    made = build(tmp_path)
    with pytest.raises(Killed):
        stage1(made, progress=killer(at))
    assert runs(tmp_path)["0001-distill"]["status"] == "running"
    resumed = distill(made, tiny.latents(40), tiny.Denoise(), resume="0001-distill")
    same(resumed, whole)


@pytest.mark.parametrize("decided", [True, False])
def test_what_is_stacked_is_decided_once_though_no_checkpoint_was_written(
    tmp_path, monkeypatch, decided
):
    from graftc.distillation import generation
    from graftc.distillation.run import Run

    sites = [tiny.attention_site(i, budget=Budget(steps=6)) for i in (1, 2)]
    names = [["blocks.1.attn", "blocks.2.attn"]]

    def made(folder):
        folder.mkdir()
        return tiny.FakeBuild(folder, tiny.targets(*sites))

    def decides(stacks):
        monkeypatch.setattr(generation, "decide", lambda *_: stacks)

    def dies(*_):
        raise Killed

    options = {"batch": 8, "checkpoint_every": 3, "stacked": "auto"}
    first, second = names if decided else [], [] if decided else names
    decides(first)
    expected = distill(made(tmp_path / "whole"), tiny.latents(40), tiny.Denoise(), **options)
    killed = made(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", dies)
        with pytest.raises(Killed):
            distill(killed, tiny.latents(40), tiny.Denoise(), **options)
    assert not (tmp_path / "killed" / "runs" / "0001-distill" / "checkpoint.safetensors").exists()
    decides(second)  # as another load of the machine might
    same(distill(killed, tiny.latents(40), tiny.Denoise(), resume="0001-distill"), expected)


def test_stage_1_killed_twice(tmp_path, whole):
    made = build(tmp_path)
    with pytest.raises(Killed):
        stage1(made, progress=killer(6))
    with pytest.raises(Killed):
        stage1(made, progress=killer(6), resume="0001-distill", batch=None, optimiser=None)
    same(stage1(made, resume="0001-distill"), whole)


@pytest.mark.parametrize("train", list(TRAINS))
def test_stage_2_killed_and_resumed(tmp_path, train):
    made, other = build(tmp_path / "a", train), build(tmp_path / "b", train)
    expected = stage2(other)
    with pytest.raises(Killed):
        stage2(made, progress=killer(13))
    same(stage2(made, resume="0001-finetune"), expected)


def test_stage_2_with_dropout_killed_and_resumed(tmp_path):
    """The random numbers of a step are a function of the step, and BatchNorm's buffers are in the checkpoint."""

    def noisy(path):
        made = build(path)
        made.make_student = lambda: tiny.noisy(tiny.paired((1, 2)))
        return made

    expected, made = stage2(noisy(tmp_path / "a")), noisy(tmp_path / "b")
    with pytest.raises(Killed):
        stage2(made, progress=killer(13))
    torch.rand(7)  # what else the second process drew
    same(stage2(made, resume="0001-finetune"), expected)


def test_a_finished_run_resumed_is_its_result(tmp_path):
    made = build(tmp_path)
    done = stage2(made)
    assert stage2(made, resume=done.id) == done


def test_a_process_killed_while_it_works(tmp_path, whole):
    """SIGKILL at no chosen point: whatever was being written, the checkpoint is whole."""
    script = textwrap.dedent(f"""
        import sys, time, torch
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        torch.set_num_threads(1)
        from pathlib import Path
        from tests.distillation import test_resume as t
        def slowly(*_):
            print("step", flush=True)
            time.sleep(0.05)
        t.stage1(t.build(Path({str(tmp_path)!r})), progress=slowly, checkpoint_every=1)
    """)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(11):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert runs(tmp_path)["0001-distill"]["status"] == "running"
    resumed = stage1(build(tmp_path), resume="0001-distill", checkpoint_every=4)
    same(resumed, whole)


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path, whole):
    made = build(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(phase, done, *_):
        if done == 7:  # files of more than 8 kB are refused from here on, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    try:
        with pytest.raises(GraftError) as raised:
            stage1(made, progress=fills_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.diagnostics[0].code == "G550"
    assert "no room left" in str(raised.value)
    home = tmp_path / "runs" / "0001-distill"
    assert {p.name for p in home.iterdir()} == {
        "run.yaml",
        "lock",
        "log.jsonl",
        "checkpoint.safetensors",
    }
    assert load_tensors(home / "checkpoint.safetensors")[1]["state"]["step"] == 6
    same(stage1(made, resume="0001-distill"), whole)


def test_two_processes_on_one_run_are_refused(tmp_path):
    made = build(tmp_path)
    with open_run(made, "distill", options={}) as run:
        with (
            pytest.raises(GraftError) as raised,
            open_run(made, "distill", options={}, resume=run.id),
        ):
            pass
        assert raised.value.diagnostics[0].code == "G563"
        assert f"process {os.getpid()}" in str(raised.value)
        with open_run(made, "distill", options={}) as other:  # another run is welcome
            assert other.id == "0002-distill"
    with open_run(made, "distill", options={}, resume=run.id):
        pass


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        (None, {"resume": "0009-distill"}, "G560"),
        (None, {"resume": "0001-distill", "seed": 4}, "G564"),
        (None, {"resume": "0001-distill", "optimiser": "adamw"}, "G564"),
        ("targets", {"resume": "0001-distill"}, "G565"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_told(tmp_path, change, options, code):
    made = build(tmp_path)
    with pytest.raises(Killed):
        stage1(made, progress=killer(3))
    if change:
        made.targets["sites"][0]["loss"]["weight"] = 2.0
    with pytest.raises(GraftError) as raised:
        distill(made, tiny.latents(40), tiny.Denoise(), **options)
    assert raised.value.diagnostics[0].code == code


def test_stage_2_of_a_run_that_is_not_finished_is_told(tmp_path):
    made = build(tmp_path)
    with pytest.raises(Killed):
        stage1(made, progress=killer(3))
    with pytest.raises(GraftError) as raised:
        stage2(made, run="0001-distill")
    assert raised.value.diagnostics[0].code == "G561"
    assert list(runs(tmp_path)) == ["0001-distill"]
    with pytest.raises(GraftError) as raised:
        stage2(made, resume="0001-distill")
    assert raised.value.diagnostics[0].code == "G562"


def test_a_checkpoint_is_replaced_or_left(tmp_path):
    path = tmp_path / "c.safetensors"
    shared = torch.ones(4)
    save_tensors(path, {"a": shared, "b": shared, "c": shared[:2].t()}, {"step": 1})
    tensors, facts = load_tensors(path)
    assert facts == {"step": 1}
    assert [tensors[n].tolist() for n in "abc"] == [[1.0] * 4, [1.0] * 4, [1.0] * 2]
    with pytest.raises(GraftError):
        save_tensors(tmp_path / "none" / "c.safetensors", {"a": shared}, {})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(GraftError) as raised:
        load_tensors(path)
    assert raised.value.diagnostics[0].code == "G551"


def test_a_digest_tells_targets_apart():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2})


def test_a_run_says_what_it_was_made_with(tmp_path):
    made = build(tmp_path)
    sources = {
        "data": {"reference": "data.py:images", "sha256": "ab" * 32, "path": Path("data.py")},
        "command": ["graftc", "distill"],
    }
    plain = {**sources, "data": {**sources["data"], "path": "data.py"}}
    with pytest.raises(Killed):
        stage1(made, progress=killer(5), sources=sources)
    assert runs(tmp_path)["0001-distill"]["sources"] == plain
    resumed = {"resume": "0001-distill", "sources": {"command": ["graftc", "distill", "--resume"]}}
    distill(made, tiny.latents(40), tiny.Denoise(), **resumed)  # not compared, not replaced
    stage2(made, steps=1, sources={"task": {"reference": "ddpm"}})
    stage2(made, steps=1)
    found = runs(tmp_path)
    assert found["0001-distill"]["status"] == "finished"
    assert found["0001-distill"]["sources"] == plain
    assert found["0002-finetune"]["sources"] == {"task": {"reference": "ddpm"}}
    assert "sources" not in found["0003-finetune"]
