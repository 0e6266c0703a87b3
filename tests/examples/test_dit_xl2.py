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
from graftc.weights.released import load_student, read_state

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/dit_xl2"
SMALL = {"size": 8, "dim": 32, "depth": 4, "num_heads": 2, "classes": 10}
FILTER = "blocks.1.attn.short_filter.weight"


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


def test_a_file_of_other_names_leaves_no_build(tmp_path):
    model = _model()
    file = tmp_path / "model.pt"
    torch.save({n: t for n, t in _released(model).items() if n != FILTER}, file)
    with pytest.raises(GraftError, match=f"G723.*the file has no `{FILTER}`"):
        verbs.compile(EXAMPLE / "hyena_x_50.graft", model, tmp_path / "build", student_weights=file)
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"blocks.9.x": torch.zeros(1)}, "G724", ["the student has no `blocks.9.x`"]),
        ({FILTER: torch.zeros(96, 1, 3)}, "G725", ["[96, 1, 4]", "[96, 1, 3]"]),
        ({FILTER: torch.full((96, 1, 4), float("nan"))}, "G726", [FILTER]),
    ],
)
def test_what_does_not_fit_the_student_leaves_it_as_it_was(changed, code, said):
    model = _model()
    state = _released(model)
    student = _by_hand(model, state)
    before = {n: t.clone() for n, t in student.state_dict().items()}
    with pytest.raises(GraftError) as caught:
        load_student(student, {**_released(model), **changed}, ())
    assert all(text in str(caught.value) for text in [code, *said])
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


class Anything:
    """What a pickle may hold besides tensors."""


class Code:
    """What would run a command as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran-by-a-pickle",))


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no")
    torch.save({"ema": {"steps": 3}}, tmp_path / "steps.pt")
    torch.save({"ema": {}, "args": Anything()}, tmp_path / "anything.pt")
    for name, code in [
        ("none.pt", "G720"), ("text.safetensors", "G721"), ("anything.pt", "G721"), ("steps.pt", "G722"),
    ]:  # fmt: skip
        with pytest.raises(GraftError, match=code):
            read_state(tmp_path / name)


def test_a_pickle_of_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": {"w": torch.zeros(1)}, "code": Code()}, tmp_path / "model.pt")
    with pytest.raises(GraftError, match=r"G721[\s\S]*was not unpickled: posix.mkdir"):
        read_state(tmp_path / "model.pt")
    assert not (tmp_path / "ran-by-a-pickle").exists()
