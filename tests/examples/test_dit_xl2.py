"""Released checkpoints: a state dict of the released DiT's layout becomes a student, or is refused by name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import graftc.verbs as verbs
from graftc.diagnostics import GraftError
from graftc.operators.build import build
from graftc.operators.specs import SPECS
from graftc.program.model import Reference

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/dit_xl2"
SMALL = {"size": 8, "dim": 32, "depth": 4, "num_heads": 2, "classes": 10}


def _from_example(name: str) -> Any:
    return Reference(f"{EXAMPLE}/model.py:{name}").resolve()


def _model() -> Any:
    torch.manual_seed(0)
    module = _from_example("DiT")(**SMALL).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return _from_example("describe")(module)


def _released(model: Any) -> dict[str, torch.Tensor]:
    """A checkpoint as the paper's: the DiT's names, and in odd blocks the operator's instead of qkv and proj."""
    state = {n: torch.randn_like(t) / 20 for n, t in model.module.state_dict().items()}
    for i in (1, 3):
        state = {n: t for n, t in state.items() if not n.startswith(f"blocks.{i}.attn.")}
        for name, shape in {
            "in_proj.weight": (96, 32), "in_proj.bias": (96,), "short_filter.weight": (96, 1, 4),
            "short_filter.bias": (96,), "out_proj.weight": (32, 32), "out_proj.bias": (32,),
        }.items():  # fmt: skip
            state[f"blocks.{i}.attn.{name}"] = torch.randn(shape) / 10
    return state


def _by_hand(model: Any, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The released model as its authors build it: attention swapped for the operator, then the state dict."""
    module = _from_example("DiT")(**SMALL).eval()
    spec = SPECS["hyena_x"]
    for i in (1, 3):
        module.blocks[i].attn = build(
            spec, {a.name: {"dim": 32}.get(a.name, a.default) for a in spec.args}
        )
    module.load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("form", ["ema", "flat", "safetensors"])
def test_a_released_checkpoint_becomes_the_student(form, tmp_path):
    model = _model()
    before = {n: t.clone() for n, t in model.module.state_dict().items()}
    state = _released(model)
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        save_file(state, file)
    else:
        said = argparse.Namespace(
            lr=1e-4, results="out"
        )  # what facebookresearch/DiT stores beside the weights
        torch.save({"ema": state, "steps": 50000, "args": said} if form == "ema" else state, file)
    made = verbs.compile(
        EXAMPLE / "hyena_x_50.graft", model, tmp_path / "build", student_weights=file
    )
    x = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([3, 900]), "y": torch.tensor([1, 10])}
    with torch.no_grad():
        torch.testing.assert_close(made.student().eval()(**x), _by_hand(model, state)(**x))
        torch.testing.assert_close(made.teacher().eval()(**x), model.module(**x))
    assert all(torch.equal(t, before[n]) for n, t in model.module.state_dict().items())
    assert made.manifest["student_weights"]["absolute"] == str(file)
    assert not any(site["pending"] for site in made.targets["sites"])
    assert {w["from"] for e in made.plan["edits"] for w in e["weights"]} == {file.name}


def _refused(tmp_path: Path, state: Any, name: str = "model.pt") -> str:
    torch.save(state, tmp_path / name)
    with pytest.raises(GraftError) as caught:
        verbs.compile(
            EXAMPLE / "hyena_x_50.graft",
            _model(),
            tmp_path / "build",
            student_weights=tmp_path / name,
        )
    assert not (tmp_path / "build").exists()
    return str(caught.value)


class Anything:
    """What a pickle may hold besides tensors."""


class Code:
    """What would run a command as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran-by-a-pickle",))


def test_wrong_files_are_refused_by_name(tmp_path, monkeypatch):
    state = _released(_model())
    first = "blocks.1.attn.short_filter.weight"
    without = {n: t for n, t in state.items() if n != first}
    assert f"the file has no `{first}`" in (said := _refused(tmp_path, without))
    assert "G723" in said
    assert "the student has no `blocks.9.x`" in (
        said := _refused(tmp_path, {"ema": {**state, "blocks.9.x": torch.zeros(1)}})
    )
    assert "G724" in said
    said = _refused(tmp_path, {**state, first: torch.zeros(96, 1, 3)})
    assert "G725" in said
    assert "[96, 1, 4]" in said
    assert "[96, 1, 3]" in said
    assert "G726" in _refused(tmp_path, {**state, first: torch.full((96, 1, 4), float("nan"))})
    assert "G722" in _refused(tmp_path, {"ema": {"steps": 3}})
    assert "G721" in _refused(tmp_path, {"ema": state, "args": Anything()})
    monkeypatch.chdir(tmp_path)
    said = _refused(tmp_path, {"ema": state, "code": Code()})
    assert "G721" in said
    assert "was not unpickled: posix.mkdir" in said
    assert not (tmp_path / "ran-by-a-pickle").exists()
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(GraftError, match="G721"):
        verbs.compile(EXAMPLE / "hyena_x_50.graft", _model(), tmp_path / "build",
                      student_weights=tmp_path / "text.safetensors")  # fmt: skip
    with pytest.raises(GraftError, match="G720"):
        verbs.compile(EXAMPLE / "hyena_x_50.graft", _model(), tmp_path / "build",
                      student_weights=tmp_path / "none.pt")  # fmt: skip


@pytest.mark.slow
def test_the_real_size_plans_without_weights():
    made = verbs.plan(EXAMPLE / "hyena_x_50.graft", f"{EXAMPLE}/model.py:teacher")
    assert [s.edit.name for s in made.steps] == [f"blocks.{i}.attn" for i in range(1, 28, 2)]
    assert {s.after.params for s in made.steps} == {5_330_304}
    assert made.parameters[0] == 675_129_632
