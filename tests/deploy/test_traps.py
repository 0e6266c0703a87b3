"""Forms that exporters get wrong, and precisions that users meet as black images."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.deploy.directory import export_module
from graftc.deploy.forms import check_forms
from graftc.deploy.ladder import verify_export
from graftc.deploy.precision import choose_islands, lower, narrowed
from graftc.deploy.regions import regions_of
from graftc.deploy.repair import repair
from graftc.deploy.request import read_request
from graftc.deploy.tensorrt import unsupported
from graftc.diagnostics import GraftError
from graftc.emit.package import load_package, write_package
from graftc.program.capture import capture
from graftc.program.model import load_model

ROOT = Path(__file__).parents[2]


def value(name: str, shape: list, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def graph(inputs: list[ir.Value], *nodes: ir.Node, opset: int = 23) -> ir.Model:
    outputs = nodes[-1].outputs
    for out in outputs:
        out.type = out.type or inputs[0].type
    made = ir.Graph(inputs, outputs, nodes=list(nodes), opset_imports={"": opset}, name="trap")
    return ir.Model(made, ir_version=10)


def kinds(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_a_squeeze_of_an_axis_that_is_not_one_is_taken_out():
    x, axes = value("x", ["batch", 4, 8]), ir.tensor([1], dtype=ir.DataType.INT64, name="axes")
    axis = ir.Value(name="axes", const_value=axes, type=ir.TensorType(ir.DataType.INT64))
    squeeze = ir.node("Squeeze", [x, axis])
    model = graph([x], squeeze, ir.node("Relu", [squeeze.outputs[0]]))
    assert repair(model) == {"squeeze of an axis that is not 1": 1}
    assert kinds(model) == ["Relu"]


def test_an_einsum_that_permutes_becomes_a_transposition():
    x = value("x", [2, 3, 4], ir.DataType.BFLOAT16)
    model = graph([x], ir.node("Einsum", [x], {"equation": "abc->cab"}))
    assert repair(model)["einsum"] == 1
    node = next(iter(model.graph))
    assert (node.op_type, list(node.attributes["perm"].as_ints())) == ("Transpose", [2, 0, 1])


def test_another_einsum_in_bfloat16_is_computed_in_float32():
    x, y = value("x", [2, 3], ir.DataType.BFLOAT16), value("y", [3, 4], ir.DataType.BFLOAT16)
    model = graph([x, y], ir.node("Einsum", [x, y], {"equation": "ab,bc->ac"}))
    repair(model)
    assert kinds(model) == ["Cast", "Cast", "Einsum", "Cast"]
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16


def test_a_mask_of_one_row_is_expanded_to_the_queries():
    q, k = value("q", ["b", 2, 16, 8]), value("k", ["b", 2, 12, 8])
    mask = value("m", ["b", 1, 1, 12])
    model = graph([q, k, mask], ir.node("Attention", [q, k, k, mask]))
    assert repair(model) == {"mask of one row": 1}
    assert kinds(model) == [
        "Shape",
        "Constant",
        "Concat",
        "Expand",
        "Attention",
    ] or "Expand" in kinds(model)
    assert list(next(n for n in model.graph if n.op_type == "Attention").inputs[3].shape)[-2:] == [
        16,
        12,
    ]


def test_a_file_without_traps_is_not_touched():
    x = value("x", [2, 3])
    assert not repair(graph([x], ir.node("Relu", [x])))


@pytest.mark.parametrize(
    ("form", "forward"),
    [
        ("FFT", lambda x: torch.fft.rfft(x).real),
        ("fold", lambda x: torch.nn.functional.fold(x.reshape(2, 4, 16), (5, 5), (2, 2))),
        ("unfold", lambda x: torch.nn.functional.unfold(x.reshape(2, 1, 8, 8), (2, 2))),
        ("unfold", lambda x: x.unfold(1, 4, 2)),
        ("scatter-add", lambda x: torch.zeros_like(x).scatter_add(1, torch.zeros(2, 64, dtype=torch.long), x)),
        ("unrolled loop", lambda x: torch.stack([x.tanh() * i for i in range(300)])),
    ],
)  # fmt: skip
def test_a_forbidden_form_is_named_with_what_to_write_instead(form, forward):
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity(), Inner()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](x)

    exported = torch.export.export(Model(), (torch.randn(2, 64),), strict=False)
    with pytest.raises(GraftError) as error:
        check_forms(exported, {"blocks.1": "mixer @ a.graft:7"})
    found = error.value.diagnostics[0]
    assert found.code == "G670"
    assert found.message.startswith(f"{form} (aten.") or form == "unrolled loop"
    assert form in found.message
    assert found.site is not None
    assert found.site.startswith("blocks.1")
    assert "a.graft:7" in found.notes[0].message
    assert found.help


def test_an_operator_that_tensorrt_lacks_is_named_with_site_and_rule():
    x = value("x", [2, 2])
    node = ir.node("Det", [x])
    node.metadata_props.update({"graftc.region": "blocks.3.attn", "graftc.rule": "r @ a.graft:2"})
    assert unsupported(graph([x], node)) == [
        ("Det", "blocks.3.attn, r @ a.graft:2", "not in the list")
    ]
    q = value("q", [1, 2, 4, 8])
    attention = graph([q], ir.node("Attention", [q, q, q]))
    assert unsupported(attention, "10.9")[0][2] == "since TensorRT 10.14"
    assert not unsupported(attention, "10.15")


class Wide(nn.Module):
    """Blocks whose hidden channels are scaled: what overflows lies inside, or in the stream between them."""

    def __init__(self, inner: float, stream: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Hidden(inner) for _ in range(2))
        self.stream = stream
        self.head = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.stream
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Hidden(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.mlp = Mlp(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Mlp(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 64), nn.Linear(64, 16), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.scale) / self.scale


def chosen(model: nn.Module, precision, x: Tensor):
    return choose_islands(model.eval(), precision, regions_of(model, {}), {"x": x}, {})


def test_a_region_that_overflows_becomes_an_island():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16)
    model = Wide(inner=1e5, stream=1.0)
    with torch.no_grad(), narrowed(model, "fp16"):
        assert not model(x=x).isfinite().all()  # the black image
    choice = chosen(model, "fp16", x)
    assert set(choice.islands) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert "overflows" in choice.islands["blocks.0.mlp"]
    assert choice.error < 2e-3
    assert chosen(model, "bf16", x).error < 2e-2
    with torch.no_grad(), narrowed(model, "fp16", list(choice.islands)):
        found = model(x=x)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_a_stream_beyond_the_type_is_refused():
    """No island helps where the values between the regions are too large."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16)
    with pytest.raises(GraftError) as error:
        chosen(Wide(inner=1.0, stream=1e5), "fp16", x)
    assert error.value.diagnostics[0].code == "G665"
    assert "blocks." in str(error.value)
    assert "bf16" in (error.value.diagnostics[0].help or "")
    assert chosen(Wide(inner=1.0, stream=1e5), "bf16", x).error < 2e-2


def test_what_needs_no_island_has_none():
    torch.manual_seed(0)
    model = Wide(inner=1.0, stream=1.0)
    before = copy.deepcopy(model.state_dict())
    assert not chosen(model, "bf16", torch.randn(2, 8, 16)).islands
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("islands", [(), ("blocks.0.mlp",)])
def test_what_islands_are_chosen_by_is_what_is_written(islands):
    """Cast as they are used, or cast for good: the same numbers, and no weight is changed by trying."""
    torch.manual_seed(0)
    model, x = Wide(inner=1.0, stream=1.0).eval(), torch.randn(2, 8, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), narrowed(model, "bf16", islands):
        tried = model(x=x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    lower(model, "bf16", islands)
    with torch.no_grad():
        assert torch.equal(tried, model(x=x))
    kept = {str(p.dtype) for p in model.blocks[0].mlp.parameters()}
    assert kept == {"torch.float32" if islands else "torch.bfloat16"}


class Rotates(nn.Module):
    """Angles made from constants are float32 whatever the weights are; attention takes no two types."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        q = x * torch.arange(x.shape[1], dtype=torch.float32)[:, None].cos()
        return nn.functional.scaled_dot_product_attention(q, q, x)


def test_a_model_that_mixes_types_is_refused_with_its_line():
    with pytest.raises(GraftError) as error:
        chosen(Rotates(), "fp16", torch.randn(2, 8, 16))
    found = error.value.diagnostics[0]
    assert found.code == "G672"
    assert any("scaled_dot_product_attention" in n.message for n in found.notes)


@pytest.fixture(scope="module")
def teacher() -> graftc.Model:
    return load_model(f"{ROOT}/examples/digits/model.py:teacher")


def scaled(teacher: graftc.Model, scale: float) -> nn.Module:
    """The digits teacher, its numbers unchanged, but the values of one attention are `scale` times as large inside."""
    model = copy.deepcopy(teacher.module).eval()
    attention = model.blocks[3].attn
    with torch.no_grad():
        attention.qkv.weight[2 * 64 :] *= scale
        attention.qkv.bias[2 * 64 :] *= scale
        attention.proj.weight /= scale
    return model


@pytest.mark.parametrize(
    ("scale", "islands"), [(1e3, set()), (1e4, set()), (1e5, {"blocks.3.attn"})]
)
def test_channels_that_are_scaled_inside(teacher, scale, islands):
    """An island where fp16 overflows, and none where it still holds: what is measured decides, not what is large."""
    model = scaled(teacher, scale)
    inputs = dict(teacher.inputs)
    with torch.no_grad():
        wanted, found = teacher.module(**inputs), model(**inputs)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    choice = choose_islands(model, "fp16", regions_of(model, {}), inputs, {})
    assert set(choice.islands) == islands
    assert choice.error < 2e-3
    with torch.no_grad(), narrowed(model, "fp16"):
        assert bool(model(**inputs).isfinite().all()) == (
            not islands
        )  # without islands: the black image
    assert not choose_islands(model, "bf16", regions_of(model, {}), inputs, {}).islands


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4, 1e5])
def test_a_scaled_model_leaves_in_fp16_all_the_same(teacher, scale, tmp_path):
    model = graftc.Model(scaled(teacher, scale), teacher.inputs, meanings=teacher.meanings)
    about = write_package(capture(model), tmp_path / "package")
    request = read_request(about, precision="fp16", dynamic="batch=1:2:4")
    export = export_module(load_package(tmp_path / "package"), about, tmp_path / "out", request)
    result = verify_export(export, regions=True)
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]
