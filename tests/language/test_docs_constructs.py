"""Every construct of the grammar stands in an example of docs/language.md, which test_docs.py checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lark import Lark, Tree
from lark import Token as LarkToken

from graftc.diagnostics import Source
from graftc.language.parser import grammar
from graftc.language.resources import grammar_text
from graftc.language.tokens import lay_out, scan

PAGE = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```graft\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def used() -> frozenset[str]:
    """The rules and alternatives that the examples' trees have, and their tokens."""
    bare = Lark(grammar_text(), parser="lalr", lexer="basic", start="start", keep_all_tokens=True)
    return frozenset(name for text in EXAMPLES for name in _names(_tree(bare, text)))


def _tree(bare: Lark, text: str) -> Any:
    """Lark's own tree of a text, from graftc's tokens: a word is a keyword where the grammar takes one."""
    raw, errors = scan(Source("example.graft", text), grammar().terminals)
    assert not errors
    driver: Any = bare.parse_interactive("")
    for token in lay_out(raw):
        kind = token.type
        if token.keyword is not None:
            kind = token.keyword if token.keyword in driver.choices() else "NAME"
        driver.feed_token(LarkToken(kind, token.value, token.start))
    return driver.feed_eof()


def _names(tree: Any) -> Iterator[str]:
    if isinstance(tree, Tree):
        yield str(tree.data)
        for child in tree.children:
            yield from _names(child)
    else:
        yield tree.type


def test_every_alternative_has_an_example(used: frozenset[str]) -> None:
    text = re.sub(r"//[^\n]*", "", grammar_text())
    named = set(re.findall(r"-> (\w+)", text))
    plain = {n for n in re.findall(r"^(\w+):", text, re.MULTILINE) if n.islower()}
    # A rule whose alternatives all have names is in no tree by its own.
    own = {n for n in plain if not _all_named(text, n)}
    assert " ".join(sorted((named | own) - used - {"start"})) == ""


def _all_named(text: str, rule: str) -> bool:
    body = re.search(rf"^{rule}:(.*?)(?=^\??\w+:|\Z)", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    return all("->" in line for line in re.split(r"\n\s*\|", body.group(1)))


def test_every_word_and_sign_has_an_example(used: frozenset[str]) -> None:
    silent = {"COMMENT", "SPACE", "NL"}
    wanted = {t.name for t in grammar().lark.terminals} - silent
    assert " ".join(sorted(wanted - used)) == ""
