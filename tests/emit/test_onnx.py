"""ONNX: the file, what is checked of it, and that the checks can fail."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

import graftc.emit.onnx as exporter
import graftc.emit.verify as verifier
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


def rung(result, name):
    return next((r for r in result if r.name == name), None)


def test_only_a_refusal_of_the_size_counts(build, monkeypatch):
    def other(session, given):
        if given["x"].shape[-1] != 8:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return run(session, given)

    run = verifier._run
    assert "is refused" in rung(verify(build, batches=(2,)).rungs, "fixed sizes").detail
    monkeypatch.setattr(verifier, "_run", other)
    found = rung(verify(build, batches=(2,)).rungs, "fixed sizes")
    assert found.state == "FAIL"
    assert "TypeError: Got unsupported ScalarType BFloat16" in found.detail


def test_a_file_that_the_runtime_rejects_fails(build, tmp_path):
    def foreign(proto):
        proto.graph.node[0].op_type = "NoSuchOperator"

    result = verify(build, changed(build, tmp_path, foreign))
    found = rung(result.rungs, "ONNX Runtime, CPU")
    assert found.state == "FAIL"
    assert "NoSuchOperator" in found.detail
    assert not result.passed
    assert not result.not_run


def ported(dtype, shape=("batch", 4)):
    port = {"name": "x", "shape": list(shape), "dtype": dtype, "meaning": "other"}
    facts = {"mode": "eval", "dtype": dtype, "dynamic": {s: 2 for s in shape if isinstance(s, str)}}
    outputs = {"kind": "tensor", "names": []}
    return {"inputs": [port], "outputs": outputs, "facts": facts, "provenance": {}}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * self.factor).to(x.dtype)


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_a_model_without_a_fixed_size_has_no_such_rung(tmp_path):
    config, module = ported("float32", ("batch", "tokens")), Times()
    path = export_module(module, config, tmp_path / "scale.onnx")
    rungs = check_runtime(path, module, config, batches=(2,))
    assert rung(rungs, "fixed sizes") is None
    assert rungs[0].state == "PASS", rungs


def test_bfloat16_inputs_reach_the_runtime(tmp_path):
    """Cast there and back: ONNX Runtime has no other bfloat16 operators on the CPU."""
    make, types = onnx.helper, onnx.TensorProto
    weight = make.make_tensor("w", types.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    nodes = [
        make.make_node("Cast", ["x"], ["a"], to=types.FLOAT),
        make.make_node("Mul", ["a", "w"], ["b"]),
        make.make_node("Cast", ["b"], ["output"], to=types.BFLOAT16),
    ]
    ports = [make.make_tensor_value_info(n, types.BFLOAT16, ["batch", 4]) for n in ("x", "output")]
    graph = make.make_graph(nodes, "scale", ports[:1], ports[1:], [weight])
    proto = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, str(tmp_path / "half.onnx"))

    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.float() * torch.arange(1, 5)).bfloat16()

    rungs = check_runtime(tmp_path / "half.onnx", Half(), ported("bfloat16"), batches=(2, 3))
    assert {r.name: r.state for r in rungs} == {
        "ONNX Runtime, batch 2": "PASS",
        "ONNX Runtime, batch 3": "PASS",
        "fixed sizes": "PASS",
        "negative control": "PASS",
    }, rungs


def test_weights_beside_the_file_are_replaced_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_EMBEDDED_LIMIT", 0)
    (tmp_path / "wide.onnx").write_bytes(b"of an older version")
    (tmp_path / "wide.onnx.data").write_bytes(b"of an older version")
    (tmp_path / "wide.onnx.mine.data").write_bytes(b"of someone else")
    config, first, second = ported("float32", ("batch", 64)), nn.Linear(64, 64), nn.Linear(64, 64)
    for module in (first, second):
        module.forward = lambda x, m=module: torch.nn.functional.linear(x, m.weight, m.bias)
    path = tmp_path / "wide.onnx"

    def names():
        return sorted(p.name for p in tmp_path.iterdir())

    def passes(module):
        rungs = check_runtime(path, module, config, batches=(2,))
        return {r.state for r in rungs} == {"PASS"}

    export_module(first, config, path)
    old = names()
    assert len(old) == 3
    assert re.fullmatch(r"wide\.onnx\.[0-9a-f]{16}\.data", old[1])
    assert old[2] == "wide.onnx.mine.data"
    assert passes(first)

    whole = exporter.files.whole_file

    def full(target):
        if target.name == "wide.onnx":
            exporter.files.cannot_write(OSError(28, "No space left on device"), target)
        return whole(target)

    with monkeypatch.context() as patch:
        patch.setattr(exporter.files, "whole_file", full)
        with pytest.raises(GraftError, match="what was there before is unchanged"):
            export_module(second, config, path)
    assert names() == old
    assert passes(first)

    export_module(second, config, path)
    assert len(names()) == 3
    assert names()[1] != old[1]
    assert passes(second)
    export_module(second, config, path)  # the same weights again
    assert passes(second)
    monkeypatch.setattr(exporter, "_EMBEDDED_LIMIT", 10**9)
    export_module(second, config, path)
    assert names() == ["wide.onnx", "wide.onnx.mine.data"]
    assert passes(second)
