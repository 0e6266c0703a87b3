"""Dataflow rules on models: what they become, what they refuse, and that all of it can be undone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graftc.compiler import Compiled, compile_model, undone
from graftc.diagnostics import GraftError, Source
from graftc.language.check import check
from graftc.program.analysis import analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.program import Program, structure_hash
from graftc.rewrite.apply import undo
from graftc.rewrite.plan import make_plan
from tests.rewrite.dataflow import nets

STANDARD = {
    "written_attention": lambda: nets.Attention(),
    "fused_qkv": lambda: nets.Attention(),
    "written_layer_norm": lambda: nets.Block(nn.Linear(16, 16), nets.WrittenNorm()),
    "written_rms_norm": lambda: nets.Block(nn.Linear(16, 16), nets.WrittenRms()),
    "scaled_linear": lambda: nets.Scaled(nn.Linear(16, 8), 8),
    "scaled_conv": lambda: nets.Scaled(nn.Conv2d(3, 6, 3, padding=1), 1, 6, 1, 1),
    "merged_linears": lambda: nets.Stack(nn.Linear(16, 32, bias=False), nn.Linear(32, 16)),
    "written_gelu": lambda: nets.Stack(nn.Linear(16, 16), nets.WrittenGelu()),
    "written_gelu_tanh": lambda: nets.Stack(nn.Linear(16, 16), nets.WrittenGeluTanh()),
    "written_silu": lambda: nets.Stack(nn.Linear(16, 16), nets.WrittenSilu()),
}
SHAPES = {"scaled_conv": (2, 3, 8, 8)}
FEWER = {
    "written_attention": "softmax",
    "fused_qkv": "linear",
    "written_layer_norm": "rsqrt",
    "written_rms_norm": "rsqrt",
    "scaled_linear": "mul",
    "scaled_conv": "mul",
    "merged_linears": "linear",
    "written_gelu": "erf",
    "written_gelu_tanh": "tanh",
    "written_silu": "sigmoid",
}


def compiled(text: str, module: nn.Module, *shape: int) -> Compiled:
    return compile_model(check(Source("rules.graft", text)), nets.model(module, *shape), 0)


def refused(text: str, module: nn.Module, *shape: int) -> str:
    with pytest.raises(GraftError) as error:
        compiled(text, module, *shape)
    return str(error.value)


def mlp() -> nn.Module:
    return nets.Stack(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def ops(program: Program) -> list[str]:
    return [
        str(n.target) for _, m in program.graphs() for n in m.graph.nodes if n.op == "call_function"
    ]


@pytest.mark.parametrize("rule", STANDARD)
def test_a_standard_rule_keeps_what_the_model_computes(rule: str) -> None:
    made = compiled(f"use {rule} from std.exact", STANDARD[rule](), *SHAPES.get(rule, ()))
    assert len(made.checks) >= 1  # proved by running
    before, after = (sum(FEWER[rule] in op for op in ops(p)) for p in (made.teacher, made.student))
    assert after < before


@pytest.mark.parametrize("rule", STANDARD)
def test_undo_gives_the_original_back(rule: str) -> None:
    made = compiled(f"use {rule} from std.exact", STANDARD[rule](), *SHAPES.get(rule, ()))
    back = undo(made.student, made.patch)
    assert structure_hash(back.root) == structure_hash(made.teacher.root)
    before, after = (
        made.teacher.root.state_dict(keep_vars=True),
        back.root.state_dict(keep_vars=True),
    )
    assert list(before) == list(after)
    assert all(before[n] is after[n] for n in before)


def test_new_parameters_are_named_where_they_are_read_and_old_ones_go() -> None:
    made = compiled("use fused_qkv from std.exact", nets.Block(nets.Attention(), nn.LayerNorm(16)))
    names = [n for n, _ in made.student.root.named_parameters()]
    assert {"part.w_graft0", "part.b_graft0", "part.out.weight"} <= set(names)
    assert not any(n.startswith("part.q") for n in names)
    (step,) = made.plan.steps
    assert [(o.parameter, o.text) for o in step.origins] == [
        ("part.w_graft0", "cat(wq, wk, wv)"),
        ("part.b_graft0", "cat(bq, bk, bv)"),
    ]
    assert set(step.dropped) == {f"part.{p}.{t}" for p in "qkv" for t in ("weight", "bias")}


def test_linears_without_bias_are_fused_without_one() -> None:
    made = compiled("use fused_qkv from std.exact", nets.Attention(bias=False))
    assert not hasattr(made.student.root, "b_graft0")


def test_two_rules_and_a_site_edit_are_applied_at_once() -> None:
    text = """
        use written_attention, fused_qkv from std.exact
        rule narrow { match m = mlp
                      replace m with mlp(ratio = 1) }
    """
    module = nets.Stack(
        nets.Block(nets.Attention(), nn.LayerNorm(16)), nets.Block(mlp(), nn.LayerNorm(16))
    )
    made = compiled(text, module)
    assert sorted({s.edit.rule.name for s in made.plan.steps}) == [
        "fused_qkv",
        "narrow",
        "written_attention",
    ]
    assert any("scaled_dot_product" in op for op in ops(made.student))
    back = undo(made.student, made.patch)
    assert structure_hash(back.root) == structure_hash(made.teacher.root)


def test_an_inner_value_that_leaks_blocks_the_match_and_names_its_user() -> None:
    said = refused("use written_attention from std.exact", nets.Leaky())
    assert "G332" in said
    assert "`sum_1`" in said  # the user that `p` leaks to


def test_a_value_that_the_model_returns_leaks_too() -> None:
    class Returned(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(x)
            return torch.exp(y), y

    text = "rule r { match { y = exp(relu(x)) }\n rewrite { y = exp(abs(x)) } }"
    assert "is also returned by the model" in refused(text, Returned())


def test_a_match_across_module_borders_opens_the_inner_module_and_keeps_its_names() -> None:
    text = """
        rule negate exact {
            match   { y = linear(x, w, b) * s }
            rewrite { y = linear(x * s, w) + b * s }
        }
    """
    made = compiled(text.replace("x * s", "x").replace("linear(x, w) + b * s", "s * linear(x, w, b)"),
                    nets.Stack(nets.Scaled(nn.Linear(16, 8), 8), nn.ReLU()))  # fmt: skip
    assert "0.inner.weight" in dict(made.student.root.named_parameters())
    back = undo(made.student, made.patch)
    assert structure_hash(back.root) == structure_hash(made.teacher.root)


def test_a_match_across_the_border_of_a_block_is_refused() -> None:
    blocks = nets.Stack(*(nets.Block(mlp(), nn.LayerNorm(16)) for _ in range(3)))
    text = """
        rule r {
            match {
                r = x + h
                y = layer_norm(r, s, w, b)
            }
            rewrite { y = layer_norm(r, s, w) + b }
        }
    """
    assert "G382" in refused(text, blocks)


def test_a_wrong_rewrite_that_says_exact_is_found_out() -> None:
    text = "rule r exact { match { y = relu(x) }\n rewrite { y = silu(x) } }"
    said = refused(text, nets.Stack(nn.Linear(16, 16), nn.ReLU()))
    assert "G370" in said or "G388" in said


def test_a_rewrite_of_another_shape_is_refused_with_both_shapes() -> None:
    text = "rule r { match { y = relu(x) }\n rewrite { y = transpose(relu(x), 0, 1) } }"
    said = refused(text, nets.Stack(nn.Linear(16, 16), nn.ReLU()))
    assert "[2, 5, 16] float32" in said
    assert "[5, 2, 16] float32" in said


def test_a_rule_that_claims_the_ops_of_another_is_refused() -> None:
    text = """
        use written_attention from std.exact
        rule all { match a = self_attention
                   replace a with hyena_x(kernel = 3) }
    """
    assert "G340" in refused(text, nets.Block(nets.Attention(), nn.LayerNorm(16)))


def test_a_site_may_be_one_of_the_ops() -> None:
    text = """
        rule halve exact {
            match   m = mlp in blocks 0..1
            match   { y = x + m(h) }
            rewrite { y = x + m(h) * 1.0 }
        }
    """
    blocks = nets.Stack(*(nets.Block(mlp(), nn.LayerNorm(16)) for _ in range(4)))
    made = compiled(text, blocks)
    assert [s.edit.graph for s in made.plan.steps] == ["0", "1"]


@pytest.mark.parametrize(
    ("where", "places"),
    [
        ("s is number or s is parameter", 1),
        ("not (s is number or s is tensor)", 0),
        ("s is number or dtype(x) == float64", 0),
    ],
)
def test_what_a_value_is_may_stand_beside_or(where: str, places: int) -> None:
    text = f"rule r {{\n match {{ y = linear(x, w, b) * s }}\n where {where}\n rewrite {{ y = linear(x, w, b) }}\n expect {places}\n}}"
    model = nets.model(nets.Scaled(nn.Linear(16, 8), 8))
    if places:
        assert len(make_plan(check(text), analyse(capture(model))).steps) == places
        return
    with pytest.raises(GraftError, match=r"s is not a number|s is a tensor"):
        make_plan(check(text.replace("expect 0", "expect 1")), analyse(capture(model)))


def test_the_student_is_printed_as_source_and_computes_the_same(tmp_path: Path) -> None:
    import graftc

    torch.manual_seed(0)
    model = nets.model(nets.Block(nets.Attention(), nets.WrittenNorm()))
    file = tmp_path / "r.graft"
    file.write_text("use written_attention, fused_qkv, written_layer_norm from std.exact\n")
    graftc.compile(file, model, tmp_path / "build")
    source = (tmp_path / "build" / "student" / "model.py").read_text()
    assert "F.scaled_dot_product_attention" in source
    assert ".chunk(3, dim=-1)" in source
    assert "rsqrt" not in source
    space: dict[str, object] = {
        "__file__": str(tmp_path / "build/student/model.py"),
        "__name__": "student",
    }
    exec(compile(source, "model.py", "exec"), space)
    student = space["load"]()  # type: ignore[operator]
    assert torch.allclose(student(model.inputs["x"]), model.module(model.inputs["x"]), atol=1e-5)


def test_a_repeated_rule_runs_until_nothing_is_left_and_says_how_its_measure_fell() -> None:
    made = compiled("use no_ops from std.exact", nets.Back())
    assert ops(made.student) == ["aten.mul.Tensor"]
    assert any("rule `no_ops` ran" in line and "ops 5 →" in line for line in made.checks)
    back = undone(made)
    assert structure_hash(back.root) == structure_hash(made.teacher.root)


def test_a_measure_that_does_not_fall_is_an_error() -> None:
    text = "rule r repeat(ops) { match { y = relu(x) }\n rewrite { y = relu(neg(neg(x))) } }"
    said = refused(text, nets.Stack(nn.Linear(16, 16), nn.ReLU()))
    assert "G389" in said
    assert "wanted: less than 2" in said


def test_a_plan_proves_an_exact_rule_without_the_weights() -> None:
    with torch.device("meta"):
        module = nets.Attention()
    text = "use written_attention, fused_qkv from std.exact"
    given = {"x": torch.zeros(2, 5, 16, device="meta")}
    analysis = analyse(capture(Model(module.eval(), given)))
    said = make_plan(check(Source("rules.graft", text)), analysis).checks
    assert ["in float64 (limit 1e-10)" in line for line in said] == [True, True]
