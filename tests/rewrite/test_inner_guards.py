"""Guards on the one site of a role inside a matched block: `heads(b.attention) == 4`."""

from __future__ import annotations

import pytest

from graftc.diagnostics import GraftError, edited
from graftc.language.check import check
from graftc.program.analysis import Analysis
from graftc.rewrite.match import match
from graftc.rewrite.plan import make_plan
from graftc.rewrite.whynot import explain


def rule(where: str, blocks: str = "all") -> str:
    return f"rule r {{\n  match b = block in blocks {blocks}\n  where {where}\n  skip b\n}}"


def test_a_guard_reads_the_site_inside(digits: Analysis) -> None:
    (found,) = check(rule("heads(b.attention) == 4 and ratio(b.mlp) >= 2")).rules
    assert len(match(found, digits).found) == 8
    (none,) = explain(check(rule("heads(b.attention) == 3")), digits)
    assert not none.selected
    assert none.misses[0].text.endswith("heads(b.attention) is 4, wanted == 3; and 7 more like it")
    (again,) = explain(check(edited(none.rule.span.source, none.edits)), digits)
    assert len(again.selected) == 8


@pytest.mark.parametrize(
    ("where", "code", "span", "help"),
    [
        ("heads(b.atention) == 4", "G109", "atention", "write `attention`"),
        ("ratio(b.attention) == 4", "G125", "ratio(b.attention)", ""),
        ("kind(b.attention.q) == self", "G109", "q", ""),
        ("kind(b.norm) == layernorm", "G121", "layernorm", ""),
    ],
)
def test_what_is_misspelt(where: str, code: str, span: str, help: str) -> None:
    with pytest.raises(GraftError) as caught:
        check(rule(where))
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert found.span is not None
    assert found.span.text == span
    assert help in (found.help or "")


def test_a_block_without_the_site_is_told(digits: Analysis) -> None:
    with pytest.raises(GraftError) as caught:
        make_plan(check(rule("heads(b.cross_attention) == 4")), digits)
    assert caught.value.diagnostics[0].code == "G450"


def test_arguments_read_matched_sites_alone(digits: Analysis) -> None:
    text = "rule r {\n  match b = block in blocks odd\n  insert mlp(ratio = ratio(b.mlp)) after b\n  train inserted\n}"
    with pytest.raises(GraftError) as caught:
        make_plan(check(text), digits)
    assert "G442" in [d.code for d in caught.value.diagnostics]
