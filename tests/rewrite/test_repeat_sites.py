"""`repeat(measure)` of `remove` and `skip`: round after round on what is left, and the measure falls in each."""

from __future__ import annotations

import pytest

from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.language.rules import Unapplied
from graftc.program.analysis import Analysis
from graftc.program.program import Program
from graftc.rewrite.plan import make_plan
from graftc.rewrite.repeat import run_repeated, undo_rounds


def head(text: str, of: str, words: str = "") -> str:
    return f"rule prune repeat({of}) {words} {{\n  {text}\n}}"


def weights(program: Program) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in program.root.named_parameters()}


def test_the_last_block_goes_until_no_chain_is_left(digits: Analysis) -> None:
    (rule,) = check(head("match b = block in blocks last 1\n  skip b", "params")).rules
    student, rounds = run_repeated([rule], digits.program)
    assert len(rounds) > 3
    assert all(r.after < r.before for r in rounds)
    assert [r.before for r in rounds[1:]] == [r.after for r in rounds[:-1]]
    assert len({r.edits[0].name for r in rounds}) == len(rounds), "another block in each round"
    back = undo_rounds(student, rounds)
    assert weights(back) == weights(digits.program)


def test_a_rule_that_takes_all_at_once_runs_once(digits: Analysis) -> None:
    plan = make_plan(check(head("match a = mlp in blocks odd\n  remove a", "ops")), digits)
    (line,) = (c for c in plan.checks if "prune" in c)
    assert "ran 1 times, 4 matches: ops " in line


def test_a_measure_that_does_not_fall_is_told(digits: Analysis) -> None:
    rules = check(head("match a = mlp in blocks odd\n  remove a", "count(softmax)"))
    with pytest.raises(GraftError) as caught:
        make_plan(rules, digits)
    (found,) = caught.value.diagnostics
    assert found.code == "G389"
    assert found.span is not None
    assert found.span.text == "repeat(count(softmax))"


@pytest.mark.parametrize(
    ("text", "words", "code", "span"),
    [
        ("match a = mlp in blocks odd\n  remove a\n  distill l2", "", "G440", "distill l2"),
        ("match a = mlp in blocks odd\n  remove a", "exact", "G441", "repeat(ops)"),
    ],
)
def test_what_cannot_repeat(text: str, words: str, code: str, span: str) -> None:
    with pytest.raises(GraftError) as caught:
        check(head(text, "ops", words))
    assert [(d.code, d.span.text if d.span else "") for d in caught.value.diagnostics] == [
        (code, span)
    ]


def test_an_edit_that_brings_weights_is_a_note() -> None:
    rules = check(head("match a = mlp in blocks odd\n  replace a with mlp(ratio = 2)", "params"))
    assert isinstance(rules.rules[0].edit, Unapplied)
    assert [d.code for d in rules.notes] == ["G160"]
