"""`graftc.load_targets(DIR)`: any training loop can use a build's targets."""

from __future__ import annotations

import runpy

import pytest
import torch
from safetensors.torch import load_file, load_model

import graftc
from graftc.diagnostics import GraftError
from tests.distillation.test_bank import ONE_OF, Noisy, compiled, tokens


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    torch.set_num_threads(1)
    return compiled(tmp_path_factory.mktemp("plain"), ONE_OF)


@pytest.fixture
def work(build):
    return graftc.load_targets(build, task=Noisy())


def test_one_module_gives_the_named_values_of_every_site_and_candidate(work):
    inputs = next(work.batches(tokens(), batch=4))
    values = work.capture()(**inputs)
    assert list(values) == list(work.students)
    assert set(values["blocks.1.attn/1"]) == {"x", "output"}
    block = work.teacher.get_submodule("blocks.1")
    expected = block.attn(values["blocks.1.attn"]["x"])
    torch.testing.assert_close(values["blocks.1.attn"]["output"], expected)


def test_a_loss_is_one_for_a_prediction_of_zero(work):
    values = work.capture()(**next(work.batches(tokens(), batch=4)))
    for name, loss in work.losses.items():
        zero = torch.zeros_like(values[name]["output"])
        assert loss(zero, values[name]).item() == pytest.approx(1.0)
        assert loss(values[name]["output"], values[name]).item() == 0


def test_the_emitted_loop_trains_and_its_weights_load(build, work, monkeypatch):
    """The file in the build, run as it stands."""
    example = runpy.run_path(str(build.path / "distill_example.py"))
    monkeypatch.setattr(graftc.verbs.training, "task_of", lambda *_: Noisy())
    done = example["train"](tokens(), steps=12, batch=8)
    values = work.capture()(**next(work.batches(tokens(seed=9), batch=16)))
    before, after = (
        sum(w.losses[n](w.students[n](values[n]), values[n]).item() for n in w.students)
        for w in (work, done)
    )
    assert after < before
    example["save_model"](done.merge(), str(build.path / "distilled.safetensors"))
    fresh = build.student()
    load_model(fresh, str(build.path / "distilled.safetensors"))
    assert load_file(build.path / "distilled.safetensors").keys() <= fresh.state_dict().keys()
    x = tokens()[0]["x"][None]
    torch.testing.assert_close(fresh(x), done.merge()(x))


def test_a_candidate_is_merged_into_the_student(work):
    x = torch.stack([s["x"] for s in tokens()[:2]])
    own = work.merge()(x)
    chosen = work.merge({"blocks.1.attn": 1})
    assert type(chosen.get_submodule("blocks.1.attn")).__name__ == "SlidingWindow"
    assert not torch.allclose(chosen(x), own)


def test_what_is_not_there_is_told(work):
    with pytest.raises(GraftError, match="G581"):
        work.capture(["blocks.1.atn"])
    with pytest.raises(GraftError, match="G581"):
        work.merge({"blocks.1.attn": 2})  # keep has no module of its own
