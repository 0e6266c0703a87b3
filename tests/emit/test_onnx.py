"""ONNX: the file, what is checked of it, and that the checks can fail."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from graftc.diagnostics import GraftError
from graftc.emit.build import Build, write_build
from graftc.emit.onnx import export_module, export_onnx
from graftc.emit.verify import check_runtime, compare, verify
from graftc.program.capture import capture
from tests.emit import models
from tests.emit.conftest import with_module

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    model = models.tiny_dit()
    program = capture(model)
    student = with_module(capture(model), "blocks.2.attn", models.token_mixer(32))
    made = write_build(
        tmp_path_factory.mktemp("onnx") / "build", student=student, teacher=program, plan={}, targets={},
        manifest={}, copy_teacher=True, provenance={"blocks.2.attn": "mix @ dit.graft:3"},
    )  # fmt: skip
    export_onnx(made)
    return made


def test_every_rung_passes(build, capfd):
    result = verify(build)
    assert {r.name: r.state for r in result.rungs} == {
        "weights": "PASS",
        "onnx checker": "PASS",
        **{f"ONNX Runtime, batch {b}": "PASS" for b in (1, 2, 3, 5)},
        "fixed sizes": "PASS",
        "negative control": "PASS",
    }, result
    assert result.passed
    control = result.rungs[-1].detail
    assert "blocks.2.attn" in control  # the edited site is tried first
    assert capfd.readouterr().out == ""


def test_the_file_names_what_it_has(build):
    proto = onnx.load(str(build.path / "student.onnx"))
    assert [i.name for i in proto.graph.input] == ["x", "t", "y"]
    assert [o.name for o in proto.graph.output] == ["output"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert next(o.version for o in proto.opset_import if not o.domain) == 20
    ruled = [n for n in proto.graph.node if any(p.key == "graftc.rule" for p in n.metadata_props)]
    assert ruled
    assert all(
        p.value == "mix @ dit.graft:3"
        for n in ruled
        for p in n.metadata_props
        if p.key == "graftc.rule"
    )


def changed(build, tmp_path, change):
    proto = onnx.load(str(build.path / "student.onnx"))
    change(proto)
    onnx.save(proto, str(tmp_path / "changed.onnx"))
    return tmp_path / "changed.onnx"


def test_a_changed_weight_fails(build, tmp_path):
    def shift(proto):
        weight = next(i for i in proto.graph.initializer if i.name == "head.bias")
        values = onnx.numpy_helper.to_array(weight) + 0.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight.name))

    result = verify(build, changed(build, tmp_path, shift))
    assert not result.passed
    assert {r.state for r in result.rungs if "batch" in r.name} == {"FAIL"}


def test_files_of_others(build, tmp_path):
    def other(proto):
        next(p for p in proto.metadata_props if p.key == "graftc.build").value = "0" * 64

    def foreign(proto):
        del proto.metadata_props[:]

    (tmp_path / "cut.onnx").write_bytes((build.path / "student.onnx").read_bytes()[:5000])
    for file, code in [
        (changed(build, tmp_path, other), "G652"),
        (tmp_path / "absent.onnx", "G650"),
        (tmp_path / "cut.onnx", "G650"),
    ]:
        with pytest.raises(GraftError) as error:
            verify(build, file)
        assert error.value.diagnostics[0].code == code
    with pytest.raises(GraftError, match="not written by graftc"):
        verify(build, changed(build, tmp_path, foreign))


def test_given_inputs_are_used(build):
    seen: list[int] = []

    def inputs(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return {
            "x": torch.randn(batch, 3, 8, 8, generator=generator),
            "t": torch.full((batch,), 999),
            "y": torch.zeros(batch, dtype=torch.long),
        }

    result = verify(build, inputs=inputs, batches=(1, 4))
    assert seen == [1, 4]
    assert result.passed
    assert "given inputs" in result.rungs[2].detail


def test_without_onnxruntime_nothing_is_claimed(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = verify(build)
    states = {r.name: r.state for r in result.rungs}
    assert states["ONNX Runtime, CPU"] == states["negative control"] == "NOT RUN"
    assert "pip install" in result.not_run[0].detail


def test_weights_behind_zero_gates_are_passed_over(build):
    model = build.student()
    with torch.no_grad():
        for block in model.blocks:
            block.adaln[1].weight.zero_()
            block.adaln[1].bias.zero_()
    config = {**build.config(), "provenance": {}}
    path = build.path.parent / "gates.onnx"
    export_module(model, config, path)
    control = check_runtime(path, model, config, batches=(2,))[-1]
    assert control.state == "PASS"
    assert "move nothing" in control.detail


def test_an_operator_that_onnx_lacks_is_named_with_its_site(build, tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Identity(), Special()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner[1](x) * 2

    class Special(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.special_bessel_j0(x)

    port = {"name": "x", "shape": ["batch", 4], "dtype": "float32", "meaning": "other"}
    facts = {"mode": "eval", "dtype": "float32", "dynamic": {"batch": 2}}
    config = {"inputs": [port], "outputs": {"kind": "tensor", "names": []}, "facts": facts}
    with pytest.raises(GraftError) as error:
        export_module(Odd(), config, tmp_path / "odd.onnx")
    assert error.value.diagnostics[0].code == "G642"
    assert "aten.special_bessel_j0" in str(error.value)
    assert error.value.diagnostics[0].site == "inner.1"
    assert list(tmp_path.iterdir()) == []


def test_compare_does_not_hide_nan():
    nan = [torch.tensor([1.0, float("nan")])]
    assert not compare(nan, nan).within("float32")
    assert not compare([torch.ones(2)], nan).within("float32")
    assert not compare([torch.zeros(2)], [torch.ones(2)]).within("float32")
    assert compare([torch.zeros(2)], [torch.zeros(2)]).within("float32")
    assert not compare([torch.ones(2)], [torch.ones(3)]).within("float32")
