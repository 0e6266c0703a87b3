"""Capture: the Program computes what the model computes, and moves where the model moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError
from graftc.program.analysis import Analysis
from graftc.program.capture import capture
from graftc.program.model import Model, load_model
from graftc.program.program import Program


def run(program: Program, inputs: dict[str, Any]) -> Tensor:
    out = program.root(*[inputs[p.name] for p in program.inputs])
    return out[0] if isinstance(out, tuple) else out


def primary(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@pytest.mark.parametrize("name", ["digits", "dit", "pixart"])
def test_program_equals_the_model_to_the_bit(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(f"{name}_model")
    analysis: Analysis = request.getfixturevalue(name)
    with torch.no_grad():
        wanted = primary(model.module(**model.inputs))
        assert torch.equal(run(analysis.program, dict(model.inputs)), wanted)


def test_another_batch_size(digits: Analysis, digits_model: Model) -> None:
    inputs = {"x": torch.randn(5, 1, 8, 8), "t": torch.arange(5), "y": torch.arange(5)}
    with torch.no_grad():
        assert torch.equal(run(digits.program, inputs), primary(digits_model.module(**inputs)))


def test_no_pins_are_left(dit: Analysis) -> None:
    text = "\n".join(m.code for _, m in dit.program.graphs())
    for pin in ("_assert", "device(type", "9223372036854775807, 1)", "aten.dropout"):
        assert pin not in text


def test_parameter_names_are_the_models(dit: Analysis, dit_model: Model) -> None:
    ours = {n for n, _ in dit.program.root.named_parameters()}
    assert ours <= {n for n, _ in dit_model.module.named_parameters()}
    assert dit.parameters == sum(
        p.numel() for n, p in dit_model.module.named_parameters() if n in ours
    )


def test_moves_to_bfloat16() -> None:
    from tests.conftest import small_dit

    model = small_dit(layers=2)
    program = capture(model)
    inputs = {**model.inputs, "hidden_states": model.inputs["hidden_states"].bfloat16()}
    program.root.to(torch.bfloat16)
    with torch.no_grad():
        wanted = primary(model.module.bfloat16()(**inputs))
        found = run(program, dict(inputs))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


def test_capture_failure_shows_the_users_line(tmp_path: Any) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if x.sum() > 0:  # a branch on values\n"
        "            return x + 1\n"
        "        return x\n"
        "def net():\n"
        "    return Net(), {'x': torch.ones(2, 3)}\n"
    )
    with pytest.raises(GraftError) as caught:
        capture(load_model(f"{file}:net"))
    text = str(caught.value)
    assert "G210" in text
    assert "bad.py:4" in text
    assert "torch.cond" in text


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise RuntimeError('no weights here')", "G203", "no weights here"),
        ("return 7", "G204", "(module, example_inputs)"),
        ("return torch.nn.Linear(2, 2), {'inptu': torch.ones(2, 2)}", "G205", "write `input`"),
        ("return torch.nn.Linear(2, 2), [torch.ones(2, 2)]", "G204", "dict by name"),
    ],
)
def test_bad_models(tmp_path: Any, body: str, code: str, said: str) -> None:
    file = tmp_path / "model.py"
    file.write_text(f"import torch\ndef net():\n    {body}\n")
    with pytest.raises(GraftError) as caught:
        load_model(f"{file}:net")
    assert caught.value.diagnostics[0].code == code
    assert said in str(caught.value)


def test_unknown_function_suggests_the_nearest(tmp_path: Any) -> None:
    file = tmp_path / "model.py"
    file.write_text("def teacher():\n    return None\n")
    with pytest.raises(GraftError, match="teacher"):
        load_model(f"{file}:techer")
    with pytest.raises(GraftError, match="no such file"):
        load_model(f"{tmp_path}/missing.py:teacher")


def test_a_fixed_batch_is_recorded() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 6) + torch.zeros(2, 6)

    program = capture(Model(Fixed(), {"x": torch.ones(2, 2, 3)}))
    assert program.facts.dynamic == {}
    assert "fixed" in program.facts.notes[0]


def test_a_model_that_cannot_be_captured_prints_nothing_of_torch(capfd):
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(GraftError) as raised:
        capture(Model(Branches(), {"x": torch.ones(2, 3)}))
    assert "if x.sum() > 0" in str(raised.value)
    assert capfd.readouterr() == ("", "")
