"""Structural edits: insert, copy, parallel with copies and parts, sequences, one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graftc.compiler import Compiled, compile_model
from graftc.diagnostics import Diagnostic, GraftError
from graftc.distillation.targets import Only
from graftc.distillation.targets_file import from_dict, to_dict
from graftc.emit.package import load_package, write_package
from graftc.language.check import check
from graftc.program.model import Model
from graftc.rewrite.apply import undo
from graftc.rewrite.plan_text import plan_dict
from tests.rewrite.models import Block, Decoder, tiny

ATTENTION = "match a = self_attention in blocks {1, 2}"
BLOCK = "match b = block in blocks {1, 2}"


def compiled(body: str, model: Model | None = None, head: str = "rule r") -> Compiled:
    return compile_model(check(f"{head} {{\n{body}\n}}\n"), model or tiny())


def refused(body: str, model: Model | None = None, head: str = "rule r") -> Diagnostic:
    with pytest.raises(GraftError) as caught:
        compiled(body, model, head)
    return caught.value.diagnostics[0]


def outputs(found: Compiled, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return found.teacher.root(x)[0], found.student.root(x)[0]


def same_as_original(found: Compiled) -> None:
    back = undo(found.student, found.patch).root.state_dict()
    original = found.teacher.root.state_dict()
    assert list(back) == list(original)
    assert all(torch.equal(back[n], original[n]) for n in original)


def as_source(found: Compiled, folder: Path) -> nn.Module:
    write_package(found.student, folder)
    return load_package(folder)


X = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(1))

EXACT = {
    "copy": "insert copy(b, zero = {b.attention.out, b.mlp.down}) after b\ntrain inserted",
    "operator": "insert depthwise_conv(kernel = 3) after b",
    "lerp": "replace with parallel(b, copy(b), merge = lerp(start = 0.25))\ntrain inserted",
    "sum": "replace with parallel(b, copy(b, zero = {b.attention.out, b.mlp.down}), merge = sum)",
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_edit_keeps_the_function_and_is_undone_and_printed(
    name: str, tmp_path: Path
) -> None:
    found = compiled(f"{BLOCK}\n{EXACT[name]}", head="rule r exact")
    wanted, got = outputs(found, X)
    torch.testing.assert_close(got, wanted)
    student = found.student.root
    assert sum(p.numel() for p in student.parameters()) == found.plan.parameters[1]
    assert found.plan.parameters[1] > found.plan.parameters[0]
    same_as_original(found)
    with torch.no_grad():
        assert torch.equal(as_source(found, tmp_path / "student")(X), got)


def test_a_copy_has_weights_of_its_own_and_a_name_beside_its_source() -> None:
    found = compiled(f"{BLOCK}\n{EXACT['copy']}")
    state = found.student.root.state_dict()
    names = [n.removeprefix("blocks.1.") for n in state if n.startswith("blocks.1.")]
    assert names == [n.removeprefix("blocks.1_graft0.") for n in state if "1_graft0" in n]
    assert not state["blocks.1_graft0.attn.out.weight"].any()
    assert not state["blocks.1_graft0.mlp.down.bias"].any()
    copied, source = state["blocks.1_graft0.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"]
    assert torch.equal(copied, source)
    assert copied.data_ptr() != source.data_ptr()
    weights = plan_dict(found.plan)["edits"][0]["weights"]
    said = {w["parameter"]: w["from"] for w in weights}
    assert said["blocks.1_graft0.attn.out.bias"] == "zero"
    assert said["blocks.1_graft0.mlp.up.weight"] == "copy(blocks.1.mlp.up.weight)"


def test_train_inserted_holds_in_stage_2() -> None:
    found = compiled(f"{BLOCK}\n{EXACT['copy']}")
    assert found.targets.stage2.train == Only(("blocks.1_graft0", "blocks.2_graft0"))
    assert from_dict(to_dict(found.targets)) == found.targets
    said = check(
        f"rule r {{\n{BLOCK}\n{EXACT['copy']}\n}}\nfinetune {{ steps = 10, train = all }}\n"
    )
    assert compile_model(said, tiny()).targets.stage2.train == "all"


def test_flops_of_a_copy_are_the_blocks() -> None:
    found = compiled(f"{BLOCK}\n{EXACT['copy']}")
    block = next(s for s in found.analysis.sites if s.path == "blocks.1")
    assert found.plan.steps[0].after.flops == block.facts["flops"]


def test_attention_and_mlp_together_read_one_norm() -> None:
    """What the branch computes stays what it was on its own norm, now of the same input."""
    found = compiled(
        f"{BLOCK}\nreplace with parallel(b.attention, b.mlp, merge = sum, norm = first)\ndistill l2"
    )
    original = tiny().module
    assert isinstance(original, Decoder)
    block = original.blocks[1]
    assert isinstance(block, Block)
    with torch.no_grad():
        wanted = X + block.attn(block.norm1(X)) + block.mlp(block.norm2(X))
        got = found.student.module("blocks.1")(X)
    torch.testing.assert_close(got, wanted)
    assert "blocks.1.norm2.weight" not in found.student.root.state_dict()
    site = found.targets.sites[0]
    assert site.teacher == site.student
    assert site.student.output == "blocks.1"
    assert site.trainable == ("blocks.1.attn", "blocks.1.mlp")
    same_as_original(found)


def test_together_without_a_norm_of_its_own_reads_the_first_ones_input() -> None:
    found = compiled(f"{BLOCK}\nreplace with parallel(b.attention, b.mlp, merge = sum)")
    original = tiny().module
    assert isinstance(original, Decoder)
    block = original.blocks[1]
    assert isinstance(block, Block)
    with torch.no_grad():
        n = block.norm1(X)
        wanted = X + block.attn(n) + block.mlp(n)
        torch.testing.assert_close(found.student.module("blocks.1")(X), wanted)


def test_an_adaptive_norm_cannot_be_folded(dit_model: Model) -> None:
    text = f"{BLOCK}\nreplace with parallel(b.attention, b.mlp, merge = sum, norm = first)"
    said = refused(text, dit_model)
    assert said.code == "G454"
    assert "adaptive" in (said.found or "")


def test_a_sequence_is_of_neighbours_in_the_data_flow() -> None:
    found = compiled(
        "match _a, m = self_attention then mlp in blocks {1, 2}\nreplace m with mlp(ratio = 1)\nexpect 2"
    )
    assert [e.name for e in found.plan.edits] == ["blocks.1.mlp", "blocks.2.mlp"]
    over = compiled(
        "match _m, a = mlp then self_attention in blocks {0, 1, 2}\nreplace a with hyena_x()\nexpect 2"
    )
    assert [e.name for e in over.plan.edits] == ["blocks.1.attn", "blocks.2.attn"]
    said = refused("match a, _m = mlp then mlp in blocks {0, 2}\nreplace a with mlp(ratio = 1)")
    assert said.code == "G310"
    assert "followed by blocks.1.mlp" in said.message


def test_runs_of_three_blocks() -> None:
    found = compiled(
        "match a, b, c = each run of 3 blocks 0..2\nreplace with parallel(a, b, c, merge = sum)"
    )
    with torch.no_grad():
        blocks = [found.teacher.module(f"blocks.{i}") for i in range(4)]
        merged = X + sum(blocks[i](X) - X for i in range(3))
        wanted = found.teacher.module("head")(blocks[3](merged))
    torch.testing.assert_close(outputs(found, X)[1], wanted)


REPLACE = f"rule first {{\n{ATTENTION}\nreplace a with hyena_x()\ndistill l2\n}}\n"
INSERT = f"{{\n{ATTENTION}\ninsert depthwise_conv(kernel = 3) after a\ndistill l2\n}}\n"


def test_one_rule_after_another_at_one_site() -> None:
    with pytest.raises(GraftError) as caught:
        compile_model(check(f"{REPLACE}rule second {INSERT}"), tiny())
    said = caught.value.diagnostics[0]
    assert said.code == "G340"
    assert "rule second after first" in (said.help or "")
    found = compile_model(check(f"{REPLACE}rule second after first {INSERT}"), tiny())
    targets = {s.name: s for s in found.targets.sites}
    assert targets["blocks.1.attn_graft0"].after == ("blocks.1.attn",)
    twice = check(f"{REPLACE}rule second after first {INSERT}rule third after second {INSERT}")
    made = compile_model(twice, tiny()).student.module("blocks.1")
    called = [str(n.target) for n in made.graph.nodes if n.op == "call_module"]  # type: ignore[union-attr]
    assert called[1:4] == ["attn", "attn_graft0", "attn_graft1"]


def test_nothing_that_sees_later_tokens_comes_after_a_causal_attention() -> None:
    model = tiny(causal=True)
    text = f"{BLOCK}\ninsert depthwise_conv(kernel = 3) after b"
    said = refused(text, model)
    assert said.code == "G353"
    compiled(text.replace("kernel = 3", "kernel = 3, causal = true"), model)


def test_a_part_that_a_block_has_twice_must_be_named(pixart_model: Model) -> None:
    said = refused(f"{BLOCK}\ninsert copy(b, zero = {{b.attention.out}}) after b", pixart_model)
    assert said.code == "G450"
    assert "cross_attention" in (said.help or "")


def test_one_of_plans_prices_and_keeps_every_candidate() -> None:
    text = "replace a with one of {hyena_x(), sliding_window(window = 4), keep}\ndistill l2"
    found = compiled(f"{ATTENTION}\n{text}")
    said = plan_dict(found.plan)["edits"][0]
    assert [c["operator"].partition("(")[0] for c in said["candidates"]] == [
        "hyena_x",
        "sliding_window",
        "keep",
    ]
    assert all(c["flops"] > 0 and c["parameters"] > 0 for c in said["candidates"])
    site = found.targets.sites[0]
    assert [c.package for c in site.candidates] == [None, "candidates/blocks.1.attn/1", None]
    assert from_dict(to_dict(found.targets)) == found.targets
    assert type(found.student.module("blocks.1.attn")).__name__ == "HyenaX"


def test_a_build_holds_the_other_candidates_with_their_first_weights(tmp_path: Path) -> None:
    import graftc

    text = f"rule r {{\n{ATTENTION}\nreplace a with one of {{keep, attention(), hyena_x()}}\ndistill l2\n}}\n"
    (tmp_path / "choose.graft").write_text(text)
    build = graftc.compile(tmp_path / "choose.graft", tiny(), tmp_path / "build")
    loaded = load_package(build.path / "candidates/blocks.1.attn/1")
    attention = tiny().module.get_submodule("blocks.1.attn")
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), attention(X))
    other = build.targets["sites"][0]["candidates"][2]
    (waits,) = other["pending"]
    assert (waits["module"], waits["linear"]) == ("operator", "out_proj")
    assert waits["policy"] == "alternating"
