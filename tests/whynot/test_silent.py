"""Mistakes that could pass in silence: every one is an error, or a warning or note that is printed with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from graftc.diagnostics import Diagnostic, GraftError, Source, render
from graftc.language.check import check
from graftc.language.resources import rules_folder
from graftc.program.analysis import Analysis
from graftc.rewrite.dataflow.own_side import own_side
from graftc.rewrite.plan import make_plan

CASES: list[dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("silent.yaml").read_text(encoding="utf-8")
)
ROOT = Path(__file__).parents[2]


def told(case: dict[str, Any], models: dict[str, Analysis]) -> tuple[Diagnostic, ...]:
    """What is said of the file: errors, else what is printed beside a success."""
    try:
        rules = check(Source("a.graft", case["text"]), case.get("set", {}))
        if "model" not in case:
            return rules.notes
        return make_plan(rules, models[case["model"]]).notes
    except GraftError as error:
        return error.diagnostics


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"].replace(" ", "-"))
def test_nothing_passes_in_silence(case: dict[str, Any], models: dict[str, Analysis]) -> None:
    found = told(case, models)
    right = [d for d in found if d.code == case["code"]]
    assert right, "\n".join(map(render, found)) or "silence"
    assert right[0].severity == case.get("severity", "error")
    assert right[0].span is not None or right[0].site is not None
    if "span" in case:
        assert right[0].span is not None
        assert right[0].span.text == case["span"], render(right[0])
    assert right[0].help or right[0].wanted or right[0].notes, "says what to do, or what was wanted"


FILES = sorted([*rules_folder().rglob("*.graft"), *(ROOT / "tests/corpus").glob("*.graft")])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_no_false_alarms(file: Path) -> None:
    """The rules that ship and the published edits of the corpus give no warning."""
    assert [render(d) for d in check(file).notes if d.severity == "warning"] == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_rule_matches_its_own_left_side(file: Path) -> None:
    assert [render(d) for rule in check(file).rules for d in own_side(rule)] == []


def test_the_battery_is_large() -> None:
    assert len(CASES) >= 30
