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
FILE = r"```(?:python|graft)\n# (\S+\.(?:py|graft))\n(.*?)```"
EXAMPLES = re.findall(r"```graft\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_checks(number: int, tmp_path: Path) -> None:
    for name, source in re.findall(FILE, PAGE, re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
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


def test_every_code_of_plan_and_explain_is_on_the_page() -> None:
    used: set[str] = set()
    for path in (ROOT / "graftc" / "rewrite").rglob("*.py"):
        used |= set(re.findall(r'"(G\d{3})"', path.read_text(encoding="utf-8")))
    said = set(re.findall(r"\bG\d{3}\b", PAGE))
    for first, last in re.findall(r"\bG(\d{3}) to G(\d{3})\b", PAGE):
        said |= {f"G{n}" for n in range(int(first), int(last) + 1)}
    assert " ".join(sorted(used - said)) == ""


@pytest.mark.parametrize("words", [ROLES, FACTS, POLICIES, DISTILL, FINETUNE])
def test_every_word_is_on_the_page(words: tuple[str, ...]) -> None:
    missing = [w for w in words if not re.search(rf"\b{w}\b", PAGE)]
    assert not missing
