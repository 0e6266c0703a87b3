"""The Pygments lexer and the TextMate grammar, against the language itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pygments.lexers import get_lexer_by_name, get_lexer_for_filename
from pygments.token import Comment, Error, Keyword, Name, Operator, String

from graftc.diagnostics import Source
from graftc.editor.keywords import DOCS, keywords
from graftc.editor.pygments_lexer import GraftLexer
from graftc.language.parser import parse_with_tokens
from graftc.language.resources import rules_folder

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [
        *(ROOT / "tests/corpus").glob("*.graft"),
        *rules_folder().rglob("*.graft"),
        *(ROOT / "examples").rglob("*.graft"),
    ]
)
PAGE = (ROOT / "docs/language.md").read_text(encoding="utf-8")
TEXTS = {
    **{str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in FILES},
    **{
        f"language.md {i}": text
        for i, text in enumerate(re.findall(r"```graft\n(.*?)```", PAGE, re.DOTALL))
    },
}
VSCODE = ROOT / "docs/editors/vscode"
TEXTMATE = json.loads((VSCODE / "syntaxes/graft.tmLanguage.json").read_text(encoding="utf-8"))


def test_every_keyword_has_a_line_for_hover_and_no_other_word_has() -> None:
    assert set(DOCS) == set(keywords())


@pytest.mark.parametrize("name", TEXTS)
def test_pygments_reads_every_file_whole(name: str) -> None:
    found = list(GraftLexer(stripnl=False, ensurenl=False).get_tokens(TEXTS[name]))
    assert "".join(text for _, text in found) == TEXTS[name]
    assert not [text for kind, text in found if kind in Error]


@pytest.mark.parametrize("word", sorted(keywords()))
def test_pygments_colours_every_keyword(word: str) -> None:
    (kind, text), *_ = GraftLexer().get_tokens(word)  # a fragment: as it is spelt
    assert text == word
    assert kind in Keyword or kind is Operator.Word


def test_pygments_takes_a_word_for_what_the_language_does() -> None:
    text = "rule train {\n    match   step = mlp in blocks 0..9 step 2\n    remove  step\n}\n"
    found = [(k, t) for k, t in GraftLexer().get_tokens(text) if t in ("train", "step")]
    assert [k in Keyword for k, _ in found] == [False, False, True, False]


def test_pygments_marks_what_cannot_be_read() -> None:
    found = {t: k for k, t in GraftLexer().get_tokens('set x = 4 § 2x "open\n# but this is fine')}
    assert found["§"] in Error
    assert found["2x"] in Error
    assert found['"open'] in Error
    assert found["# but this is fine"] in Comment


def test_pygments_tells_operators_roles_and_strings() -> None:
    text = 'rule r "why" {\n match a = self_attention\n replace a with hyena_x()\n}'
    found = {t: k for k, t in GraftLexer().get_tokens(text)}
    assert found['"why"'] in String
    assert found["self_attention"] in Name.Class
    assert found["hyena_x"] in Name.Function


def test_pygments_finds_the_lexer_by_name_and_by_file() -> None:
    assert isinstance(get_lexer_by_name("graft"), GraftLexer)
    assert isinstance(get_lexer_for_filename("dit.graft"), GraftLexer)


# -- TextMate --------------------------------------------------------------------------------


def patterns() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for include in TEXTMATE["patterns"]:
        found += TEXTMATE["repository"][include["include"][1:]]["patterns"]
    return found


COMPILED = [(p, re.compile(p.get("match") or p["begin"])) for p in patterns()]


def textmate(text: str) -> Iterator[tuple[str, int, int]]:
    """(scope, start, end), as an editor reads: line by line, the leftmost match, the first pattern of those.

    The grammar uses only what Oniguruma and `re` read alike.
    """
    offset = 0
    for line in text.splitlines(keepends=True):
        bare, at = line.rstrip("\r\n"), 0
        while at < len(bare):
            found = [
                (m.start(), i, m) for i, (_, r) in enumerate(COMPILED) if (m := r.search(bare, at))
            ]
            if not found:
                break
            _, which, match = min(found, key=lambda f: f[:2])
            pattern, end = COMPILED[which][0], match.end()
            if "begin" in pattern:
                inside = re.compile(r'(?:[^"\\]|\\.)*').match(bare, match.end())
                assert inside
                end = min(len(bare), inside.end() + 1)
                yield pattern["name"], offset + match.start(), offset + end
            elif "captures" in pattern:
                for number, capture in pattern["captures"].items():
                    start, stop = match.span(int(number))
                    if start < 0:
                        continue
                    yield capture["name"], offset + start, offset + stop
            else:
                yield pattern["name"], offset + match.start(), offset + end
            assert end > at
            at = end
        offset += len(line)


@pytest.mark.parametrize("name", TEXTS)
def test_textmate_scopes_every_character(name: str) -> None:
    text = TEXTS[name]
    left = [not c.isspace() for c in text]
    for _, start, end in textmate(text):
        for i in range(start, end):
            left[i] = False
    assert not [text[i : i + 20] for i, missed in enumerate(left) if missed]


@pytest.mark.parametrize("name", TEXTS)
def test_textmate_takes_the_same_words_for_keywords(name: str) -> None:
    """On all files of the project: the words that the parser takes for keywords."""
    tokens, _, errors = parse_with_tokens(Source(name, TEXTS[name]))
    assert not errors
    wanted = {(t.start, t.value) for t in tokens if t.keyword and t.type != "NAME"}
    found = {
        (start, TEXTS[name][start:end])
        for scope, start, end in textmate(TEXTS[name])
        if scope.startswith("keyword.") and TEXTS[name][start].isalpha()
    }
    assert found == wanted


@pytest.mark.parametrize("word", sorted(keywords()))
def test_textmate_colours_every_keyword(word: str) -> None:
    (scope, start, end), *_ = textmate(f"{word} 4")
    assert scope.startswith("keyword.")
    assert (start, end) == (0, len(word))


def test_the_extension_names_files_that_are_there() -> None:
    package = json.loads((VSCODE / "package.json").read_text(encoding="utf-8"))
    contributes = package["contributes"]
    paths = [package["main"], contributes["languages"][0]["configuration"]]
    paths += [g["path"] for g in contributes["grammars"]]
    assert all((VSCODE / p).is_file() for p in paths)
    json.loads((VSCODE / contributes["languages"][0]["configuration"]).read_text())
    assert contributes["grammars"][0]["scopeName"] == TEXTMATE["scopeName"]
    assert contributes["configuration"]["properties"]["graft.command"]["default"] == [
        "graftc",
        "lsp",
    ]
