"""A bank of wrong inputs: each gives its diagnostic, at its place, with its advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from graftc.diagnostics import GraftError, Source, render, to_json
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


def test_the_bank_is_large() -> None:
    assert len(CASES) >= 120
