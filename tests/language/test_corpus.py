"""Each published edit of the corpus checks, and means what its first comment says."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftc.language.blocks import select
from graftc.language.check import check
from graftc.language.rules import (
    Blocks,
    BranchPart,
    BranchSite,
    Computed,
    CopyOf,
    Fact,
    GroupMatch,
    Literal_,
    Lora,
    OperatorCall,
    Parallel,
    Replace,
    Rule,
    Rules,
    SiteMatch,
    Skip,
)
from graftc.operators.spec import Apply, Const, Part

CORPUS = Path(__file__).parent.parent / "corpus"
FILES = sorted(CORPUS.glob("*.graft"))


def corpus(name: str) -> Rules:
    return check(CORPUS / f"{name}.graft")


def only(name: str) -> Rule:
    (rule,) = corpus(name).rules
    return rule


def site(rule: Rule) -> SiteMatch:
    (match,) = rule.matches
    assert isinstance(match, SiteMatch)
    return match


def indices(rule: Rule, length: int) -> tuple[int, ...]:
    (match,) = rule.matches
    assert isinstance(match, (SiteMatch, GroupMatch))
    assert isinstance(match.blocks, Blocks)
    return select(match.blocks, length, "blocks")


def arguments(rule: Rule) -> dict[str, object]:
    assert isinstance(rule.edit, Replace)
    return {k: getattr(v, "value", v) for k, v in rule.edit.operator.arguments.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_checks(path: Path) -> None:
    rules = check(path)
    assert rules.rules
    assert rules.files == (str(path),)
    assert len(rules.digest) == 64


def test_there_are_seventeen() -> None:
    assert len(FILES) == 17


def test_hyena_and_pairs() -> None:
    rules = corpus("hyena_and_pairs")
    hyena, pairs = rules.rules
    assert hyena.name == "hyena"
    assert hyena.contract == "learned"
    assert hyena.expect == 13
    assert site(hyena).role == "self_attention"
    assert indices(hyena, 28) == tuple(range(8, 21))
    assert isinstance(hyena.edit, Replace)
    assert hyena.edit.operator.spec.name == "hyena_x"
    assert arguments(hyena) == {"kernel": 4}
    assert hyena.distill is not None
    assert hyena.distill.loss == "l1"
    assert hyena.distill.samples == 8000
    assert isinstance(pairs.matches[0], GroupMatch)
    assert pairs.matches[0].bindings == ("first", "second")
    assert isinstance(pairs.edit, Parallel)
    assert pairs.edit.merge == "linear"
    assert [b.binding for b in pairs.edit.branches if isinstance(b, BranchSite)] == [
        "first",
        "second",
    ]
    assert rules.finetune is not None
    assert rules.finetune.data_fraction == 0.25
    assert rules.finetune.warmup == 1000


def test_interleave_hyena_x() -> None:
    rules = corpus("interleave_hyena_x")
    assert indices(rules.rules[0], 28) == tuple(range(1, 28, 2))
    distill, finetune = rules.rules[0].distill, rules.finetune
    assert distill is not None
    assert finetune is not None
    assert (distill.epochs, distill.batch, distill.lr) == (200, 64, 1e-4)
    assert (finetune.data_fraction, finetune.steps, finetune.ema) == (0.1, 50_000, 0.9999)


def test_three_of_four_swa() -> None:
    rule = only("three_of_four_swa")
    assert set(range(28)) - set(indices(rule, 28)) == {0, 4, 8, 12, 16, 20, 24}
    assert arguments(rule) == {"window": 4}
    assert rule.expect == 21


def test_mlp_ratio() -> None:
    narrow, wide = corpus("mlp_ratio").rules
    assert arguments(narrow) == {"ratio": 3}
    assert arguments(wide) == {"ratio": 6}
    (init,) = narrow.inits
    assert init.slot is None
    assert init.source == Apply("keep_top", (Part("m"),), {"by": Const("magnitude")})
    assert not wide.inits


def test_depth_to_width() -> None:
    rules = corpus("depth_to_width")
    assert rules.rules[0].expect == 14
    assert indices(rules.rules[0], 28) == tuple(range(28))
    assert rules.finetune is not None
    assert rules.finetune.halve_lr_at == (75_000, 150_000)


def test_pixart_2k() -> None:
    rules = corpus("pixart_2k")
    assert indices(rules.rules[0], 28) == (8, 10, 12, 14, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27)
    assert rules.finetune is not None
    assert rules.finetune.train == Lora(64)
    assert rules.finetune.samples == 12_000


def test_conv_beside_attention() -> None:
    rule = only("conv_beside_attention")
    assert rule.contract == "exact"
    assert rule.train_inserted
    assert isinstance(rule.edit, Parallel)
    assert rule.edit.merge == "sum"
    attention, conv = rule.edit.branches
    assert isinstance(attention, BranchSite)
    assert isinstance(conv, OperatorCall)
    assert conv.spec.name == "depthwise_conv"
    assert {k: getattr(v, "value", None) for k, v in conv.arguments.items()} == {
        "kernel": 7,
        "init": "zero",
    }


def test_expand_interpolate() -> None:
    rule = only("expand_interpolate")
    assert isinstance(rule.edit, Parallel)
    assert rule.edit.merge == "lerp"
    assert rule.edit.options == {"start": 0.5}
    block, copy = rule.edit.branches
    assert isinstance(block, BranchSite)
    assert isinstance(copy, CopyOf)
    assert copy.binding == block.binding
    assert indices(rule, 12) == (3, 7, 11)


def test_parallel_block() -> None:
    rule = only("parallel_block")
    assert isinstance(rule.edit, Parallel)
    assert rule.edit.options == {"norm": "first"}
    assert [b.part for b in rule.edit.branches if isinstance(b, BranchPart)] == ["attention", "mlp"]


def test_drop_blocks() -> None:
    rule = only("drop_blocks")
    blocks = site(rule).blocks
    assert blocks is not None
    assert blocks.kind == "measured"
    assert not blocks.top
    assert blocks.count == 6
    assert blocks.measure is not None
    assert blocks.measure.name == "influence"
    assert isinstance(rule.edit, Skip)
    assert rule.edit.binding == "b"


def test_gqa() -> None:
    rule = only("gqa")
    assert isinstance(rule.edit, Replace)
    assert isinstance(rule.edit.operator.arguments["heads"], Fact)
    by_slot = {i.slot: i.source for i in rule.inits}
    assert by_slot["q"] == Part("a", "q")
    pooled = by_slot["k"]
    assert isinstance(pooled, Apply)
    assert isinstance(pooled.options["groups"], Computed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_there_is_nothing_to_note(path: Path) -> None:
    assert not check(path).notes


def test_what_is_known_of_them() -> None:
    assert only("local_2d").matches[0].blocks.chain == "transformer_blocks"  # type: ignore[union-attr]
    assert only("mamba_in_llama").drop == ("rotary",)
    assert [i.slot for i in only("mamba_in_llama").inits] == [
        "x",
        "B",
        "C",
        "out_proj",
        "z",
        "dt",
        "conv",
    ]
    assert corpus("lolcats").finetune.train == Lora(8, 16.0)  # type: ignore[union-attr]
    assert only("lolcats").distill.train == "feature_maps"  # type: ignore[union-attr]
    assert site(only("svd_linear")).within == ("mlp",)
    assert only("fold_norm").inits[0].source == Apply("fold", (Part("n"),), {})


def test_parameters_take_the_value_of_set() -> None:
    text = "set k = 4\nrule r {\n match a = self_attention in blocks odd\n replace a with hyena_x(kernel = k)\n}\n"
    for value, wanted in (("4", 4), ("8", 8)):
        (rule,) = check(text, {"k": value}).rules
        assert isinstance(rule.edit, Replace)
        argument = rule.edit.operator.arguments["kernel"]
        assert isinstance(argument, Literal_)
        assert argument.value == wanted
