"""Plan, apply, undo: what a rule does to a model, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.compiler import compile_model, initialise_new
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.program import Program
from graftc.rewrite.apply import apply, undo
from graftc.rewrite.plan import Plan, make_plan
from graftc.rewrite.plan_text import plan_dict
from tests.program.test_roles import MASKED

HYENA = """
rule hyena {
    match   a = self_attention in blocks odd
    replace a with hyena_x(kernel = 4)
    distill l1
}
"""
PAIRS = """
rule pairs {
    match   a, b = each pair of blocks all
    replace with parallel(a, b, merge = linear)
    distill l1
}
"""


def planned(text: str, analysis: Analysis) -> Plan:
    return make_plan(check(text), analysis)


def run(program: Program, model: Model) -> Tensor:
    with torch.no_grad():
        out = program.root(*[model.inputs[p.name] for p in program.inputs])
    return out[0] if isinstance(out, tuple) else out


def diagnostic(text: str, analysis: Analysis) -> Any:
    with pytest.raises(GraftError) as caught:
        planned(text, analysis)
    return caught.value.diagnostics[0]


@pytest.mark.parametrize("text", [HYENA, PAIRS, HYENA + PAIRS], ids=["hyena", "pairs", "both"])
def test_undo_gives_the_original_back_to_the_bit(
    text: str, digits: Analysis, digits_model: Model
) -> None:
    before = digits.program
    code = {p: m.code for p, m in before.graphs()}
    state = before.root.state_dict()
    wanted = run(before, digits_model)
    student, patch = apply(before, planned(text, digits).edits)
    assert not torch.equal(run(student, digits_model), wanted)
    assert {p: m.code for p, m in before.graphs()} == code, "apply changed the original"
    back = undo(student, patch)
    assert {p: m.code for p, m in back.graphs()} == code
    assert list(back.root.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in back.root.state_dict().items())
    assert torch.equal(run(back, digits_model), wanted)


def test_untouched_names_stay(digits: Analysis) -> None:
    student, _ = apply(digits.program, planned(HYENA + PAIRS, digits).edits)
    before = dict(digits.program.root.named_parameters())
    after = dict(student.root.named_parameters())
    gone = {n for n in before if n not in after}
    assert gone == {
        f"blocks.{i}.attn.{p}.{w}"
        for i in (1, 3, 5, 7)
        for p in ("qkv", "proj")
        for w in ("weight", "bias")
    }
    assert all(after[n] is before[n] for n in before if n in after)
    new = {n.rpartition(".")[0] for n in after if n not in before}
    assert new == {f"blocks_merge.{i}.proj" for i in range(4)} | {
        f"blocks.{i}.attn.{m}"
        for i in (1, 3, 5, 7)
        for m in ("in_proj", "short_filter", "out_proj")
    }


def test_pairs_read_the_same_input(digits: Analysis, digits_model: Model) -> None:
    """Against the same edit by hand, with the merge's default first weights: the mean."""
    plan = planned(PAIRS, digits)
    student, _ = apply(digits.program, plan.edits)
    initialise_new(plan, digits, student, seed=0)
    net: Any = digits_model.module
    given = digits_model.inputs
    with torch.no_grad():
        x = net.x_embedder(given["x"]) + net.pos_embed
        c = net.t_embedder(given["t"]) + net.y_embedder(given["y"])
        for i in range(0, 8, 2):
            x = (net.blocks[i](x, c) + net.blocks[i + 1](x, c)) / 2
        wanted = net.final_layer(x, c)
    found = run(student, digits_model)
    assert torch.allclose(found, wanted.reshape(-1, 8, 8, 2).permute(0, 3, 1, 2), atol=1e-5)


def test_sum_of_blocks_adds_the_branches(digits: Analysis, digits_model: Model) -> None:
    plan = planned(PAIRS.replace("linear", "sum"), digits)
    student, _ = apply(digits.program, plan.edits)
    net: Any = digits_model.module
    given = digits_model.inputs
    with torch.no_grad():
        x = net.x_embedder(given["x"]) + net.pos_embed
        c = net.t_embedder(given["t"]) + net.y_embedder(given["y"])
        for i in range(0, 8, 2):
            x = net.blocks[i](x, c) + net.blocks[i + 1](x, c) - x
        wanted = net.final_layer(x, c)
    found = run(student, digits_model)
    assert torch.allclose(found, wanted.reshape(-1, 8, 8, 2).permute(0, 3, 1, 2), atol=1e-4)


def test_removed_branch_leaves_nothing_behind(digits: Analysis, digits_model: Model) -> None:
    student, _ = apply(
        digits.program,
        planned("rule r {\n match a = self_attention in blocks {2}\n remove a\n}", digits).edits,
    )
    block: Any = student.root.get_submodule("blocks.2")
    assert "attn" not in block.code
    assert "zeros" not in block.code
    assert not any(n.startswith("blocks.2.attn") for n, _ in student.root.named_parameters())
    del digits_model


def test_skipped_block(digits: Analysis, digits_model: Model) -> None:
    student, patch = apply(
        digits.program,
        planned("rule r {\n match b = block in blocks {3}\n skip b\n}", digits).edits,
    )
    assert not any(n.startswith("blocks.3.") for n, _ in student.root.named_parameters())
    assert torch.equal(run(undo(student, patch), digits_model), run(digits.program, digits_model))


def test_skip_keeps_what_others_use(dit: Analysis, dit_model: Model) -> None:
    """diffusers' DiT reads block 0's embedder again at its end."""
    student, _ = apply(
        dit.program, planned("rule r {\n match b = block in blocks {0}\n skip b\n}", dit).edits
    )
    names = {n for n, _ in student.root.named_parameters() if n.startswith("transformer_blocks.0.")}
    assert names
    assert all(n.startswith("transformer_blocks.0.norm1.emb.") for n in names)
    run(student, dit_model)


def test_self_graft_is_exact(digits: Analysis, digits_model: Model) -> None:
    text = (
        "rule self exact {\n match a = self_attention in blocks all\n replace a with attention()\n}"
    )
    compiled = compile_model(check(text), digits_model)
    assert "is exact" in compiled.checks[0]
    assert torch.allclose(
        run(compiled.student, digits_model), run(digits.program, digits_model), atol=1e-5
    )
    assert compiled.targets.sites == ()


def test_wider_mlp_is_exact_and_a_false_claim_is_not(digits_model: Model) -> None:
    wider = "rule wide exact {{\n match m = {} in blocks all\n replace m with {}\n}}"
    compile_model(check(wider.format("mlp", "mlp(ratio = 6)")), digits_model)
    with pytest.raises(GraftError) as caught:
        compile_model(check(wider.format("mlp", "mlp(ratio = 3)")), digits_model)
    assert caught.value.diagnostics[0].code == "G370"


def test_plan_counts(digits: Analysis) -> None:
    plan = planned(HYENA + PAIRS, digits)
    d, n = 64, 64
    attention, hyena = 4 * d * d + 4 * d, 4 * d * d + 4 * d + 3 * d * 5
    merge = 2 * d * d + d
    assert plan.parameters[1] - plan.parameters[0] == 4 * (hyena - attention) + 4 * merge
    data = plan_dict(plan)
    first = data["edits"][0]
    assert first["site"] == "blocks.1.attn"
    assert first["flops"]["after"] == 8 * n * d * d + 2 * 4 * 3 * d * n + 2 * n * d
    assert {w["parameter"] for w in first["weights"]} >= {"blocks.1.attn.in_proj.weight"}
    assert first["dropped"] == [
        "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias", "blocks.1.attn.proj.weight", "blocks.1.attn.proj.bias",
    ]  # fmt: skip
    student, _ = apply(digits.program, plan.edits)
    assert sum(p.numel() for p in student.root.parameters()) == plan.parameters[1]


def test_inner_sites_are_distilled_first(digits_model: Model) -> None:
    targets = compile_model(check(HYENA + PAIRS), digits_model).targets
    after = {s.name: s.after for s in targets.sites}
    assert after["blocks.0+blocks.1"] == ("blocks.1.attn",)
    assert after["blocks.1.attn"] == ()
    pair = next(s for s in targets.sites if s.name == "blocks.2+blocks.3")
    assert pair.teacher.output == "blocks.3"
    assert pair.student.output == "blocks_merge.1"
    assert [(i.call, i.argument) for i in pair.teacher.inputs] == [("blocks.2", 0), ("blocks.2", 1)]


def test_equal_claims_conflict(digits: Analysis) -> None:
    second = HYENA.replace("rule hyena", "rule local").replace(
        "hyena_x(kernel = 4)", "sliding_window(window = 4)"
    )
    assert diagnostic(HYENA + second, digits).code == "G411"  # the text alone tells
    second = second.replace("self_attention", 'module "blocks.*.attn"')
    found = diagnostic(HYENA + second, digits)
    assert found.code == "G340"
    assert "hyena" in found.notes[0].message
    assert found.notes[0].span is not None


def test_replacing_inside_a_skipped_block_conflicts(digits: Analysis) -> None:
    found = diagnostic(HYENA + 'rule s {\n match b = module "blocks.1"\n skip b\n}', digits)
    assert found.code == "G340"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (HYENA.replace("odd", "{30}"), None, "30"),
        (HYENA.replace("blocks odd", 'blocks of "bloks" odd'), "G313", 'blocks of "blocks"'),
        ("rule r {\n match a = cross_attention in blocks odd\n remove a\n}", "G310", "is self_attention: q, k and v come from one stream"),
        (HYENA.replace("distill l1", "expect 5"), "G331", "expect 4"),
        (HYENA.replace("hyena_x(kernel = 4)", "sliding_window(window = 64)"), "G355", "64"),
        ('rule r {\n match a = module "blocks.*.mlp"\n replace a with hyena_x()\n}', "G350", "mlp"),
        (HYENA.replace("hyena_x(kernel = 4)", "attention(heads = 5)"), None, "5"),
        (PAIRS.replace("blocks all", "blocks 0..6"), None, "7"),
        (PAIRS.replace("blocks all", "blocks {0, 2}"), None, "2"),
        ('rule r {\n match a = module "blocks.*.atn"\n remove a\n}', "G310", "blocks.0.attn"),
        ("rule r {\n match b = block in blocks {3}\n remove b\n}", "G356", "skip b"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_allow(
    text: str, code: str | None, said: str, digits: Analysis
) -> None:
    with pytest.raises(GraftError) as caught:
        apply(digits.program, planned(text, digits).edits)
    found = caught.value.diagnostics[0]
    assert found.span is not None or found.site
    if code is not None:
        assert found.code == code
    assert said in str(caught.value)


def test_where_filters_and_says_so(digits: Analysis) -> None:
    text = HYENA.replace("    replace", "    where   tokens(a) >= 100\n    replace")
    found = diagnostic(text, digits)
    assert found.code == "G332"
    assert "tokens(a) is 64" in found.notes[0].message


def test_a_mask_is_not_dropped_in_silence() -> None:
    analysis = analyse(capture(MASKED))
    text = "rule r {\n match a = self_attention in blocks all\n replace a with %s\n init %s = identity\n distill l2\n}"
    planned(text % ("token_linear()", "proj"), analysis)  # it mixes no tokens: nothing to mask
    text = text % ("hyena_x()", "out_proj")
    found = diagnostic(text, analysis)
    assert found.code == "G354"
    assert "drop mask" in (found.help or "")
    planned(text.replace(" distill", " drop mask\n distill"), analysis)


class Repeated(torch.nn.Module):
    """One block, run three times: ALBERT's way."""

    def __init__(self) -> None:
        super().__init__()
        self.block = WithSpare()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class WithSpare(torch.nn.Module):
    """A block with a submodule that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = (
            torch.nn.Linear(8, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 8),
        )
        self.mlp = torch.nn.Sequential(self.up, self.act, self.down)
        self.spare = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


REMOVE = "rule r {\n match m = mlp in blocks {0}\n remove m\n}"


def test_an_edit_in_a_block_that_runs_several_times_is_of_all_its_runs() -> None:
    analysis = analyse(capture(Model(Repeated(), {"x": torch.randn(2, 5, 8)})))
    plan = planned(REMOVE, analysis)
    assert [step.runs for step in plan.steps] == [3]
    student, _ = apply(analysis.program, plan.edits)
    x = torch.randn(2, 5, 8)
    assert torch.equal(student.root(x)[0], x)  # x + 0, three times


def test_apply_leaves_the_original_whole() -> None:
    net = torch.nn.ModuleList(WithSpare() for _ in range(3))
    chain = torch.nn.Sequential(*net)
    program = analyse(capture(Model(chain, {"input": torch.randn(2, 5, 8)})))
    before = {k: v.clone() for k, v in program.program.root.state_dict().items()}
    plan = planned(REMOVE, program)
    student, patch = apply(program.program, plan.edits)
    assert list(program.program.root.state_dict()) == list(before)
    assert list(undo(student, patch).root.state_dict()) == list(before)
    assert sum(p.numel() for p in student.root.parameters()) == plan.parameters[1]
