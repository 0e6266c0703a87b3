"""The config for NVIDIA Model-Optimizer, run: on the real package where it is installed, else on a stand-in of its hooks.

`graftc targets digits_build --to modelopt` was also run on nvidia-modelopt 0.47.0, with torch 2.13 (CPU).
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.diagnostics import GraftError
from graftc.distillation.modelopt import modelopt_config, write_modelopt
from graftc.distillation.plain import Distillation
from graftc.distillation.targets import Loss
from tests.cli.test_cli import run
from tests.distillation import tiny
from tests.distillation.test_bank import CHOICE, Noisy, compiled, tokens


class Balancer(nn.Module):
    pass


def convert(model, mode):
    """As `modelopt.torch.distill.convert` for `layerwise_kd` (0.47): hooks feed a student's module the teacher's inputs."""
    ((name, config),) = mode
    assert name == "layerwise_kd"
    assert isinstance(config["loss_balancer"], Balancer)
    teacher, criterion = config["teacher_model"].requires_grad_(False), config["criterion"]
    assert all(isinstance(loss, torch.nn.modules.loss._Loss) for loss in criterion.values())
    pairs = [(model.get_submodule(s), teacher.get_submodule(t)) for s, t in criterion]
    seen: dict[nn.Module, tuple] = {}
    handles: list[Any] = []
    model.requires_grad_(False)
    for ours, theirs in pairs:
        ours.requires_grad_(True)
        handles.append(theirs.register_forward_hook(lambda m, x, y: seen.update({m: (x, y)})))
        handles.append(ours.register_forward_pre_hook(lambda _, __, m=theirs: seen[m][0]))
        handles.append(ours.register_forward_hook(lambda m, _, y: seen.update({m: y})))

    class Model(nn.Module):
        def named_parameters(self, *_, **__):
            return model.named_parameters()

        def train(self, mode=True):
            model.train(mode)

        def forward(self, **inputs):
            with torch.no_grad():
                teacher.eval()(**inputs)
            return model(**inputs)

        def compute_kd_loss(self):
            each = zip(pairs, criterion.values(), strict=True)
            found = {str(i): f(seen[s], seen[t][1]) for i, ((s, t), f) in enumerate(each)}
            return config["loss_balancer"](found)

        def export(self):
            for handle in handles:
                handle.remove()
            return model

    return Model()


@pytest.fixture
def modelopt(monkeypatch):
    if importlib.util.find_spec("modelopt") is not None:
        return
    distill = types.ModuleType("modelopt.torch.distill")
    distill.DistillationLossBalancer = Balancer
    distill.convert = convert
    distill.export = lambda model: model.export()
    for name in ("modelopt", "modelopt.torch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelopt.torch.distill", distill)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("modelopt"), CHOICE)


@pytest.mark.usefixtures("modelopt")
def test_the_file_trains_the_sites_and_nothing_else(build, tmp_path, capsys):
    file = tmp_path / "layerwise.py"
    code, out, _ = run(capsys, "targets", str(build.path), "--to", "modelopt", "-o", str(file), "--format", "json")  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert [p["student"] for p in told["pairs"]] == ["blocks.1.attn", "blocks.2.attn"]
    start = graftc.load_targets(build, task=Noisy())
    start.solve(tokens())
    trained = runpy.run_path(str(file))["train"](
        tokens(), steps=60, batch=16, lr=2e-3, task=Noisy()
    )
    before, after = start.student.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("blocks.1.attn.", "blocks.2.attn.")) for name in changed)
    values = start.capture()(**next(start.batches(tokens(), batch=16)))

    @torch.no_grad()
    def error(model: nn.Module, name: str) -> float:
        found = model.get_submodule(name)(values[name]["x"])
        return float((found - values[name]["output"]).square().sum())

    for name in ("blocks.1.attn", "blocks.2.attn"):
        assert error(trained, name) < error(start.student, name)


LOSSES = (
    Loss("l1"),
    Loss("l2", weight=3.0),
    Loss("huber", delta=0.5),
    Loss("auto"),
    Loss("l2", normalise=False),
    Loss("l1", mask_above=1.5),
)


@pytest.mark.usefixtures("modelopt")
@pytest.mark.parametrize("loss", LOSSES)
def test_its_loss_is_the_loss_of_load_targets(build, tmp_path, loss):
    work = graftc.load_targets(build, task=Noisy())
    sites = tuple(replace(s, loss=loss) for s in work.targets.sites)
    work.targets = replace(work.targets, sites=sites)
    write_modelopt(work, build.path, tmp_path / "m.py")
    emitted = runpy.run_path(str(tmp_path / "m.py"))
    (theirs, *_) = emitted["config"](work.teacher)["criterion"].values()
    values = work.capture()(**next(work.batches(tokens(), batch=8)))
    name = "blocks.1.attn"
    ours = work.losses[name]
    ours._student = replace(ours._student, site=sites[0])
    output = work.students[name](values[name])
    torch.testing.assert_close(
        theirs(output, values[name]["output"]), ours(output, values[name]), rtol=1e-4, atol=1e-6
    )


def test_a_site_of_several_calls_is_left_out_and_said(tmp_path):
    sites = (tiny.attention_site(1), tiny.pair_site())
    made = tiny.FakeBuild(tmp_path, tiny.targets(*sites), make_student=lambda: tiny.paired((1,)))
    found = modelopt_config(Distillation(made))
    assert list(found.pairs) == [("blocks.1.attn", "blocks.1.attn")]
    assert found.left_out == {"blocks.2+blocks.3": "it is more than one call"}
    assert "blocks.2+blocks.3: not here" in found.to_python(tmp_path)


def test_no_site_that_fits_is_an_error_and_writes_nothing(tmp_path):
    made = tiny.FakeBuild(tmp_path, tiny.targets(tiny.pair_site()), make_student=tiny.paired)
    with pytest.raises(GraftError, match="G583"):
        write_modelopt(Distillation(made), tmp_path, tmp_path / "m.py")
    assert not (tmp_path / "m.py").exists()


def test_the_targets_are_shown(build, capsys):
    code, out, _ = run(capsys, "targets", str(build.path))
    assert code == 0
    assert "blocks.1.attn" in out
    assert "sliding_window(window = 2" in out
    assert run(capsys, "targets", str(build.path), "--to", "modelopt")[0] == 2
    assert run(capsys, "targets", str(build.path), "--to", "nemo", "-o", "x.py")[0] == 2
    assert run(capsys, "targets", str(build.path / "student"))[0] == 1
