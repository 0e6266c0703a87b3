"""Near misses of rules on sites: the first line names the right place and the right cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from graftc.language.check import check
from graftc.program.analysis import Analysis
from graftc.rewrite.whynot import explain

CASES: list[dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("near_sites.yaml").read_text(encoding="utf-8")
)


def text_of(case: dict[str, Any]) -> str:
    bound = case["match"].partition("=")[0].strip()
    edit = f"replace with parallel({bound}, merge = sum)" if "," in bound else f"remove {bound}"
    if "= block" in case["match"]:
        edit = f"skip {bound}"
    clauses = [f"match {case['match']}", edit]
    clauses += [f"{word} {case[word]}" for word in ("where", "expect") if word in case]
    return "rule r {\n  " + "\n  ".join(clauses) + "\n}"


def first_line(case: dict[str, Any], models: dict[str, Analysis]) -> str:
    (explained,) = explain(check(text_of(case)), models[case["model"]])
    return explained.misses[0].text if explained.misses else "nothing"


def right(case: dict[str, Any], line: str) -> bool:
    return line.startswith(f"near miss at {case['place']}") and all(s in line for s in case["says"])


@pytest.mark.parametrize(
    ("pairs", "share"), [(False, 0.95), (True, 0.88)], ids=["single", "in pairs"]
)
def test_the_first_line_is_right(pairs: bool, share: float, models: dict[str, Analysis]) -> None:
    cases = [c for c in CASES if bool(c.get("pair")) is pairs]
    lines = [(c, first_line(c, models)) for c in cases]
    wrong = [f"{c['name']}: {line}" for c, line in lines if not right(c, line)]
    assert 1 - len(wrong) / len(cases) >= share, "\n".join(wrong)


def test_the_battery_is_large() -> None:
    assert len(CASES) >= 30
