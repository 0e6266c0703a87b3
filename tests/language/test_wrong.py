"""A bank of wrong inputs: each gives its diagnostic, at its place, with its advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from graftc.diagnostics import Diagnostic, GraftError, Source, edited, render, to_json
from graftc.language.check import check

BANK = Path(__file__).parent / "wrong"
CASES = [
    pytest.param(case, id=f"{path.stem}-{number}-{case['code']}")
    for path in sorted(BANK.glob("*.yaml"))
    for number, case in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("case", CASES)
def test_wrong_input(case: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(GraftError) as caught:
        check(Source(str(tmp_path / "a.graft"), case["text"]), case.get("set", {}))
    found = caught.value.diagnostics[0]
    assert found.code == case["code"], str(caught.value)
    if "span" in case:
        assert found.span is not None
        assert found.span.text == case["span"], str(caught.value)
    if "help" in case:
        assert case["help"] in (found.help or ""), str(caught.value)
    assert found.span is not None or found.site is not None
    assert found.help or found.wanted or found.notes, "says what to do, or what was wanted"
    assert render(found)
    assert to_json(found)["code"] == case["code"]


@pytest.mark.parametrize("case", CASES)
def test_an_edit_that_is_suggested_ends_the_mistake(case: dict[str, Any], tmp_path: Path) -> None:
    """Made to the text, it leaves what was wrong there behind; another mistake may then show."""
    first = told(Source(str(tmp_path / "a.graft"), case["text"]), case.get("set", {}))
    for wrong in (d for d in first if d.edits):
        assert "write `" in (wrong.help or "")
        source = wrong.edits[0].span.source
        if not source.name.endswith("a.graft"):
            continue  # a `--set` value, or a used file
        after = told(edited(source, wrong.edits), case.get("set", {}))
        said = [(d.code, d.message) for d in after]
        assert said.count((wrong.code, wrong.message)) < [(d.code, d.message) for d in first].count(
            (wrong.code, wrong.message)
        ), f"{wrong.help}: {said}"


def told(source: Source, overrides: dict[str, str]) -> tuple[Diagnostic, ...]:
    try:
        return check(source, overrides).notes
    except GraftError as error:
        return error.diagnostics


def test_most_misspellings_carry_an_edit() -> None:
    carried = 0
    for case in (c.values[0] for c in CASES):
        assert isinstance(case, dict)
        found = told(Source("a.graft", case["text"]), case.get("set", {}))  # pyright: ignore
        carried += any(d.edits for d in found)
    assert carried >= 30


def test_the_bank_is_large() -> None:
    assert len(CASES) >= 120


def test_a_line_of_a_pattern_that_cannot_be_read_is_told_once() -> None:
    """Not with each use of the names that it would have bound."""
    text = "rule a {\n match { y = rellu(x) }\n where x is number\n rewrite { y = relu(x) }\n}\n"
    assert [d.code for d in told(Source("a.graft", text), {})] == ["G371"]
