"""What docs/make.py writes is up to date, and says what the grammar says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from graftc.editor.keywords import keywords
from graftc.language.parser import grammar
from graftc.operators.specs import SPECS

DOCS = Path(__file__).parents[2] / "docs"


def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_make", DOCS / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", list(make().outputs()), ids=lambda p: p.name)
def test_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == make().outputs()[path], "run `python docs/make.py`"


def test_the_grammar_page_has_every_rule_and_every_word() -> None:
    page = (DOCS / "grammar.md").read_text(encoding="utf-8")
    rules = {str(r.origin.name) for r in grammar().lark.rules}
    for rule in rules:
        if not rule.startswith("__"):  # Lark's own, for `*` and `+`
            assert f"\n{rule.lstrip('?')}: " in page, rule
    for word in keywords():
        assert f"'{word}'" in page
        assert f"`{word}`" in page


def test_the_page_of_operators_has_each_with_its_definition_and_its_source() -> None:
    page = (DOCS / "operators.md").read_text(encoding="utf-8")
    for spec in SPECS.values():
        own = page.partition(f"\n## {spec.name}\n")[2].partition("\n## ")[0]
        assert own, spec.name
        assert all(f"| `{a.name}` |" in own for a in spec.args)
        assert spec.source in own
        assert all(f"At a {role}" in own for role in spec.variants)
