"""Operators written in the language: what they compute, and what is told of mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graftc
from graftc.compiler import compile_model
from graftc.diagnostics import Diagnostic, GraftError
from graftc.emit.package import load_package
from graftc.language.check import check
from graftc.operators.build import build
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY
from graftc.operators.linear_attention import LinearAttention
from graftc.operators.mlp import Mlp
from graftc.operators.spec import OperatorSpec, Value
from graftc.rewrite.apply import undo
from tests.rewrite.models import tiny

MIX = """operator mix(dim, width = 8) : (x: tokens[n, dim]) -> tokens[n, dim] {
    h = silu(linear(layer_norm(x, name = norm), width, name = up, init = random(0)))
    return linear(h * mean(h, 0, keep = true), dim, name = out_proj, init = zero)
}
"""
RULE = "rule r {{\n match a = {role} in blocks {{1, 2}}\n replace a with {call}\n distill l2\n}}\n"


def rule(call: str, role: str = "self_attention") -> str:
    return RULE.format(call=call, role=role)


def spec(
    call: str, role: str = "self_attention", text: str = "use std.operators\n"
) -> OperatorSpec:
    edit = check(text + rule(call, role)).rules[0].edit
    return edit.operator.spec  # type: ignore[union-attr]


def wrong(body: str, head: str = "dim") -> Diagnostic:
    text = f"operator o({head}) : (x: tokens[n, dim]) -> tokens[n, dim] {{\n{body}\n}}\n"
    with pytest.raises(GraftError) as caught:
        check(text)
    return caught.value.diagnostics[0]


HYENA: dict[str, Value] = {"dim": 8, "kernel": 3}
HEADS: dict[str, Value] = {"dim": 16, "heads": 4, "head_dim": 4}
TWINS: list[tuple[str, str, type[nn.Module], dict[str, Value]]] = [
    *(("hyena_x", "", HyenaX, {**HYENA, "causal": c}) for c in (True, False)),
    *(("hyena_y", "", HyenaY, {**HYENA, "causal": c}) for c in (True, False)),
    *(("hyena_se", "", HyenaSE, {**HYENA, "causal": c}) for c in (True, False)),
    *(
        (
            "linear_attention",
            "",
            LinearAttention,
            {**HEADS, "kv_heads": kv, "feature": feature, "causal": causal},
        )
        for kv in (4, 2)
        for feature in ("elu1", "relu")
        for causal in (True, False)
    ),
    *(
        ("gated_mlp", "mlp", Mlp, {"dim": 8, "ratio": 2.5, "activation": a})
        for a in ("gelu", "gelu_tanh", "silu", "relu_squared", "quick_gelu", "sigmoid")
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "role", "twin", "arguments"), TWINS)
def test_the_written_form_is_the_python_form_bit_for_bit(
    name: str, role: str, twin: type[nn.Module], arguments: dict[str, Value], dtype: torch.dtype
) -> None:
    given = spec(f"std.{name}()", role or "self_attention")
    torch.manual_seed(0)
    ours = build(given, arguments).to(dtype)
    torch.manual_seed(0)
    gated = {"gated": True} if twin is Mlp else {}
    theirs = twin(**arguments, **gated).to(dtype)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = torch.randn(2, 70, int(arguments["dim"] or 0), dtype=dtype)  # two chunks of a causal sum
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [m(i) for m, i in zip((ours, theirs), inputs, strict=True)]
    for result in results:
        result.square().sum().backward()
    assert torch.equal(*results)
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert given.cost(arguments, 70).params == sum(p.numel() for p in ours.parameters())
    assert given.is_causal(arguments) == (arguments.get("causal") is not False)


def test_causal_means_that_no_output_depends_on_a_later_token() -> None:
    for causal in (True, False):
        given = spec("std.linear_attention()")
        module = build(given, {**HEADS, "kv_heads": 4, "feature": "elu1", "causal": causal})
        x = torch.randn(1, 9, 16)
        later = x.clone()
        later[:, 5:] = torch.randn(1, 4, 16)
        with torch.no_grad():
            same = torch.allclose(module(x)[:, :5], module(later)[:, :5], atol=1e-6)
        assert same is causal


def test_an_operator_of_three_lines_goes_the_whole_way(tmp_path: Path) -> None:
    model = tiny()
    found = compile_model(check(MIX + rule("mix(width = 4)")), model)
    module = found.student.module("blocks.1.attn")
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "norm.weight": (16,),
        "norm.bias": (16,),
        "up.weight": (4, 16),
        "up.bias": (4,),
        "out_proj.weight": (16, 4),
        "out_proj.bias": (16,),
    }
    assert sum(p.numel() for p in found.student.root.parameters()) == found.plan.parameters[1]
    assert not module.out_proj.weight.any()  # type: ignore[union-attr]
    x = torch.randn(3, 12, 16)
    torch.testing.assert_close(module(x), torch.zeros(3, 12, 16))
    assert undo(found.student, found.patch).root.state_dict().keys() == (
        found.teacher.root.state_dict().keys()
    )
    file = tmp_path / "mix.graft"
    file.write_text(MIX + rule("mix(width = 4)"))
    built = graftc.compile(file, model, tmp_path / "build")
    source = (built.path / "student/model.py").read_text()
    assert "class Mix(nn.Module):" in source
    assert "graftc" not in source.replace("graftc 0", "").split("import torch")[1]
    with torch.no_grad():
        student = load_package(built.path / "student")
        torch.testing.assert_close(student(x), found.student.root(x)[0])


def test_first_weights_come_from_parts_by_name_and_from_init() -> None:
    found = compile_model(check("use std.operators\n" + rule("std.hyena_x()")), tiny())
    source = tiny().module.get_submodule("blocks.1.attn")
    new = found.student.module("blocks.1.attn")
    assert torch.equal(new.in_proj.weight, source.qkv.weight)  # type: ignore[union-attr]
    assert torch.equal(new.out_proj.weight, source.out.weight)  # type: ignore[union-attr]
    assert found.targets.sites[0].pending[0].linear == "out_proj"
    filled = rule("std.hyena_x()").replace(" distill", " init q = a.k\n distill")
    other = compile_model(check("use std.operators\n" + filled), tiny())
    rows = other.student.module("blocks.1.attn").in_proj.weight[:16]  # type: ignore[index,union-attr]
    assert torch.equal(rows, source.qkv.weight[16:32])  # type: ignore[union-attr,index]


def test_a_written_operator_in_place_of_a_causal_attention_must_be_causal() -> None:
    with pytest.raises(GraftError) as caught:
        compile_model(check(MIX + rule("mix()")), tiny(causal=True))
    assert caught.value.diagnostics[0].code == "G353"
    text = "use std.operators\n" + rule("std.linear_attention()")
    compile_model(check(text), tiny(causal=True))


def test_the_shipped_name_is_the_shipped_operator_and_the_qualified_one_is_not() -> None:
    assert spec("hyena_x()").written is None
    assert spec("std.hyena_x()").written is not None
    with pytest.raises(GraftError) as caught:
        spec("std.hyena_z()")
    assert "std.hyena_" in (caught.value.diagnostics[0].help or "")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return liner(x, dim, name = a)", "G460", "linear"),
        ("y = linear(x, dim, name = a)\nreturn linear(y, dim, name = a)", "G462", "another"),
        ("return linear(x, 2 * dim, name = a)", "G465", "[n, dim]"),
        ("q, k = split(linear(x, 3 * dim, name = a), 3)\nreturn q * k", "G461", "3"),
        ("return x + linear(x, 2 * dim, name = a)", "G461", "2 * dim"),
        ("return matmul(x, x)", "G461", "[…, a, b]"),
        ("return linear(x, n, name = a)", "G461", "tokens"),
        ("h = x + x\nreturn linear(x, h, name = a)", "G463", "dim"),
        ("return softmax(x, 4)", "G464", "batch"),
        ("return choose(x, x, x)", "G464", "bool"),
        ("return reshape(x, [n, 2, dim])", "G461", "2 * dim * n"),
    ],
)
def test_a_mistake_is_told_at_load_with_its_place(body: str, code: str, said: str) -> None:
    found = wrong(body)
    text = " ".join([found.message, found.wanted or "", found.found or "", found.help or ""])
    assert found.code == code, text
    assert found.span is not None
    assert said in text


def test_parameters_without_a_name_get_one() -> None:
    text = """operator o(dim) : (x: tokens[n, dim]) -> tokens[n, dim] {
    h = depthwise_conv(depthwise_conv(x, 3), 3)
    return linear(h, dim)
}
"""
    assert [x.name for x in spec("o()", text=text).slots] == ["filter", "filter_2", "proj"]


def test_sizes_are_symbolic_until_the_operator_is_built() -> None:
    text = """operator o(dim, heads) : (x: tokens[n, dim]) -> tokens[n, dim] {
    h = reshape(x, [n, heads, dim / heads])
    return reshape(softmax(h, -1), [n, dim])
}
"""
    given = spec("o()", text=text)
    with pytest.raises(ValueError, match="no size"):
        build(given, {"dim": 10, "heads": 4})
    assert build(given, {"dim": 12, "heads": 4})(torch.zeros(2, 7, 12)).shape == (2, 7, 12)
