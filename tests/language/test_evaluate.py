"""Values and verdicts of guards, with the reason in words."""

from __future__ import annotations

import pytest

from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.language.evaluate import Verdict, evaluate, holds, shown
from graftc.language.rules import Expr, Fact, Replace
from graftc.operators.spec import Value

FACTS: dict[str, Value] = {
    "tokens": 16,
    "heads": 12,
    "kv_heads": 12,
    "dim": 768,
    "head_dim": 64,
    "causal": True,
    "kind": "self",
}


def facts(fact: Fact) -> Value:
    return FACTS[fact.name]


def guard(text: str) -> Expr:
    head = "rule r {\n match a = self_attention in blocks odd\n"
    (rule,) = check(f"{head} where {text}\n remove a\n}}").rules
    assert rule.where is not None
    return rule.where


def argument(text: str) -> Expr:
    head = "rule r {\n match a = self_attention in blocks odd\n"
    (rule,) = check(f"{head} replace a with hyena_x(kernel = {text})\n}}").rules
    assert isinstance(rule.edit, Replace)
    return rule.edit.operator.arguments["kernel"]


@pytest.mark.parametrize(
    ("text", "ok", "reason"),
    [
        ("tokens(a) >= 64", False, "tokens(a) is 16, wanted >= 64"),
        ("64 <= tokens(a)", False, "tokens(a) is 16, wanted >= 64"),
        ("tokens(a) >= 16", True, "tokens(a) is 16"),
        ("causal(a)", True, "causal(a) is true"),
        ("not causal(a)", False, "causal(a) is true, wanted not causal(a)"),
        ("causal(a) and heads(a) == 8", False, "heads(a) is 12, wanted == 8"),
        ("causal(a)\n heads(a) == 8", False, "heads(a) is 12, wanted == 8"),
        ("heads(a) % 5 == 0", False, "heads(a) % 5 is 2, wanted == 0"),
        ("heads(a) != kv_heads(a)", False, "heads(a) is 12, wanted != kv_heads(a), which is 12"),
        (
            "tokens(a) > 99 or heads(a) > 99",
            False,
            "tokens(a) is 16, wanted > 99 and heads(a) is 12, wanted > 99",
        ),
        ("kind(a) != self", False, "kind(a) is self, wanted != self"),
        ("min(heads(a), dim(a)) >= 12", True, "min(heads(a), dim(a)) is 12"),
    ],
)
def test_verdicts(text: str, ok: bool, reason: str) -> None:
    assert holds(guard(text), facts) == Verdict(ok, reason)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads(a) / 4", 3),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("dim(a) / heads(a) / 8", 8),
        ("max(2, heads(a) - 4)", 8),
        ("heads(a) % 5", 2),
        ("-2 + 10", 8),
    ],
)
def test_values(text: str, value: Value) -> None:
    assert evaluate(argument(text), facts) == value


def test_an_inexact_division_names_both() -> None:
    with pytest.raises(GraftError) as caught:
        evaluate(argument("heads(a) / 5"), facts)
    (found,) = caught.value.diagnostics
    assert found.code == "G150"
    assert found.span is not None
    assert found.span.text == "heads(a) / 5"
    assert "where heads(a) % 5 == 0" in (found.help or "")


def test_division_by_zero() -> None:
    with pytest.raises(GraftError, match="G151"):
        evaluate(argument("heads(a) / (dim(a) - 768)"), facts)


@pytest.mark.parametrize("text", ["heads(a) - (2 - 1)", "(heads(a) + 1) * 2", "heads(a) / 2 / 3"])
def test_an_expression_is_shown_as_it_is_written(text: str) -> None:
    assert shown(argument(text)) == text
