"""docs/language.md: its examples check, and its table of codes is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graftc.diagnostics import Source
from graftc.language.check import check
from graftc.language.formatter import format_text
from graftc.language.vocabulary import DISTILL, FACTS, FINETUNE, POLICIES, ROLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```graft\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_checks(number: int, tmp_path: Path) -> None:
    for name, source in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(source)  # a pattern's names are read from it
    rules = check(Source(str(tmp_path / f"example{number}.graft"), EXAMPLES[number]))
    assert rules.rules


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_is_formatted(number: int) -> None:
    lines = [" ".join(line.split()) for line in EXAMPLES[number].splitlines()]
    assert [" ".join(line.split()) for line in format_text(EXAMPLES[number]).splitlines()] == lines


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 10


def test_every_code_is_in_the_table_and_every_row_is_a_code() -> None:
    used: set[str] = set()
    for path in (ROOT / "graftc" / "language").glob("*.py"):
        used |= set(re.findall(r'"(G\d{3})"', path.read_text(encoding="utf-8")))
    assert set(re.findall(r"^\| (G\d{3}) \|", PAGE, re.MULTILINE)) == used


@pytest.mark.parametrize("words", [ROLES, FACTS, POLICIES, DISTILL, FINETUNE])
def test_every_word_is_on_the_page(words: tuple[str, ...]) -> None:
    missing = [w for w in words if not re.search(rf"\b{w}\b", PAGE)]
    assert not missing
