"""A Pygments lexer for `.graft`: documentation, and terminals colour with it.

It reads with the language's own scanner and parser, so a word is a keyword exactly where the language
takes it for one. In a fragment that does not parse, every word that is spelt like a keyword is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pygments import token as kinds
from pygments.lexer import Lexer

from graftc.diagnostics import Source
from graftc.editor.keywords import group
from graftc.language.parser import parse_with_tokens
from graftc.language.tokens import Token
from graftc.language.vocabulary import FACTS, POLICIES, ROLES
from graftc.operators.specs import SPECS

_SIGNS = {
    "COMMA", "COLON", "LPAR", "RPAR", "LBRACE", "RBRACE", "LSQB", "RSQB", "DOT",
}  # fmt: skip
_KEYWORDS = {
    "item": kinds.Keyword.Declaration,
    "clause": kinds.Keyword,
    "operator": kinds.Operator.Word,
    "modifier": kinds.Keyword.Pseudo,
}
_NAMES = {
    **dict.fromkeys(SPECS, kinds.Name.Function),
    **dict.fromkeys(FACTS, kinds.Name.Builtin),
    **dict.fromkeys(POLICIES, kinds.Name.Builtin),
    **dict.fromkeys(ROLES, kinds.Name.Class),
    **dict.fromkeys(("parallel", "copy"), kinds.Name.Function),
    **dict.fromkeys(("true", "false"), kinds.Keyword.Constant),
}


class GraftLexer(Lexer):
    """Colours `.graft` texts.

    >>> from pygments.token import Keyword
    >>> tokens = list(GraftLexer().get_tokens("set n = 4"))
    >>> tokens[0] == (Keyword.Declaration, "set")
    True
    """

    name = "Graft"
    aliases: ClassVar[Sequence[str]] = ["graft"]
    filenames: ClassVar[Sequence[str]] = ["*.graft"]
    mimetypes: ClassVar[Sequence[str]] = ["text/x-graft"]
    url = "https://pypi.org/project/graftc/"
    version_added = ""

    def get_tokens_unprocessed(self, text: str) -> Iterator[tuple[int, Any, str]]:
        """(offset, kind, text) of every piece, which together are the whole text."""
        tokens, _, errors = parse_with_tokens(Source("text", text))
        at = 0
        for token in tokens:
            if token.start > at:
                yield from _between(text, at, token.start)
            yield token.start, _kind(token, text, bool(errors)), text[token.start : token.end]
            at = token.end
        if at < len(text):
            yield from _between(text, at, len(text))


def _between(text: str, start: int, end: int) -> Iterator[tuple[int, Any, str]]:
    """White space, and what the scanner could not read."""
    for piece in re.finditer(r"[ \t\r\n]+|[^ \t\r\n]+", text[start:end]):
        blank = piece.group()[0] in " \t\r\n"
        yield start + piece.start(), kinds.Whitespace if blank else kinds.Error, piece.group()


def _kind(token: Token, text: str, broken: bool) -> Any:
    written = text[token.start : token.end]
    if token.type == "COMMENT":
        return kinds.Comment.Single
    if token.type == "NL":
        return kinds.Whitespace
    if token.type == "STRING":
        return kinds.String if written[-1:] == '"' and len(written) > 1 else kinds.Error
    if token.type in ("NUMBER", "PERCENT"):
        return kinds.Number if token.value == written else kinds.Error
    if token.keyword and (token.type != "NAME" or broken):
        return _KEYWORDS[group(token.value)]
    if token.type == "NAME":
        return _NAMES.get(token.value, kinds.Name) if token.value.isascii() else kinds.Error
    return kinds.Punctuation if token.type in _SIGNS else kinds.Operator
