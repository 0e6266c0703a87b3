"""`graftc fmt`: one layout for every file, the meaning untouched.

The formatter moves white space only: it prints the same tokens in the same lines, with one
indentation for each open bracket, clauses aligned, and one space where the language has one.
A body of several lines begins and ends on lines of its own.
What it gives back is read again and compared, so that a file's meaning cannot change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftc.diagnostics import GraftError, Source
from graftc.language.parser import grammar, parse
from graftc.language.syntax_errors import CLAUSE_WORDS
from graftc.language.tokens import Token, lay_out, scan

_INDENT = 4
_CLAUSE = 8
_OPEN = frozenset({"LPAR", "LSQB", "LBRACE"})
_CLOSE = frozenset({"RPAR", "RSQB", "RBRACE"})
_NO_SPACE_BEFORE = frozenset({"COMMA", "RPAR", "RSQB", "DOT", "DOTS", "ELLIPSIS"})
_NO_SPACE_AFTER = frozenset({"LPAR", "LSQB", "DOT", "DOTS"})
_BODY_WORDS = ("match", "rewrite", "before", "after")
_BEFORE_SIGN_WORDS = ("and", "or", "not", "where", "return")
_BEFORE_SIGN = frozenset(
    [
        "COMMA",
        "LPAR",
        "LSQB",
        "LBRACE",
        "EQUAL",
        "EQ",
        "NE",
        "LT",
        "LE",
        "GT",
        "GE",
        "PLUS",
        "MINUS",
        "STAR",
        "SLASH",
        "REMAINDER",
        "COLON",
        "DOTS",
    ]
)


def format_text(text: str, name: str = "text") -> str:
    """The text in the one layout. Raises GraftError where it does not parse.

    >>> print(format_text("rule r{match a=mlp in blocks {1,2}\\nremove a}"), end="")
    rule r {
        match   a = mlp in blocks {1, 2}
        remove  a
    }
    >>> print(format_text("set x=8 .. 20   # which\\n\\n\\n\\nset y = - 1"), end="")
    set x = 8..20  # which
    <BLANKLINE>
    set y = -1
    """
    source = Source(name, text.removeprefix("\ufeff"))
    parse(source)
    formatted = laid_out(source)
    if meaning(source) != meaning(Source(name, formatted)):
        return text  # never seen; if it comes, the text stays as it was
    return formatted


def laid_out(source: Source) -> str:
    """The text of a source that parses, in the one layout."""
    tokens, _ = scan(source, grammar().terminals)
    bodies = _bodies(tokens)
    formatted = "\n".join(_lines(_opened(tokens, bodies), bodies)).strip("\n")
    return formatted + "\n" if formatted else ""


def _bodies(tokens: Sequence[Token]) -> frozenset[int]:
    """Where the braces of rules and other bodies stand; the rest hold values, as `{8, 10}` does."""
    found: set[int] = set()
    stack: list[Token] = []
    before = ""
    for token in tokens:
        if token.type in _OPEN:
            outer = len(stack)
            body = (
                before not in ("=", "except")
                if outer == 0
                else outer == 1 and before in _BODY_WORDS
            )
            if token.type == "LBRACE" and body:
                found.add(token.start)
            stack.append(token)
        elif token.type in _CLOSE and stack and stack.pop().start in found:
            found.add(token.start)
        if token.type not in ("NL", "COMMENT"):
            before = token.value
    return frozenset(found)


def meaning(source: Source) -> list[tuple[str, str]]:
    """What the parser sees, and the comments in their order."""
    tokens, _ = scan(source, grammar().terminals)
    comments = [("COMMENT", t.value.rstrip()) for t in tokens if t.type == "COMMENT"]
    return [(t.type, t.value.strip()) for t in lay_out(tokens)] + comments


def _opened(tokens: Sequence[Token], bodies: frozenset[int]) -> list[Token]:
    """The tokens with a line end after `{` and before `}` of each body that has several lines."""
    found: list[Token] = []
    stack: list[
        tuple[int, int]
    ] = []  # where the brace stands in `found`, and how many line ends came before
    ends = 0
    for token in tokens:
        ends += token.type == "NL"
        if token.type == "LBRACE" and token.start in bodies:
            stack.append((len(found), ends))
        elif token.type == "RBRACE" and token.start in bodies and stack:
            at, before = stack.pop()
            if ends > before:
                end = replace(token, type="NL", value="\n", keyword=None)
                if found[-1].type != "NL":
                    found.append(end)
                if found[at + 1].type not in ("NL", "COMMENT"):
                    found.insert(at + 1, end)
        found.append(token)
    return found


def _lines(tokens: Sequence[Token], bodies: frozenset[int]) -> list[str]:
    """The lines, with at most one empty line between two."""
    result: list[str] = []
    line: list[Token] = []
    stack: list[Token] = []
    in_clause = False
    for token in (*tokens, None):
        if token is not None and token.type != "NL":
            line.append(token)
        elif line:
            starts = _starts_clause(line, stack, bodies)
            in_clause = starts or (in_clause and line[0].type != "RBRACE")
            goes_on = in_clause and not starts and line[0].type != "COMMENT"
            result.append(_margin(line, stack, goes_on) + _printed(line, bodies, aligned=starts))
            _follow(line, stack)
            line = []
        elif token is not None and result and result[-1]:
            result.append("")
    return result


def _starts_clause(line: Sequence[Token], stack: Sequence[Token], bodies: frozenset[int]) -> bool:
    in_rule = len(stack) == 1 and stack[0].start in bodies
    named = len(line) > 1 and line[1].type == "EQUAL"  # `train = lora(…)` in a `finetune`
    return in_rule and line[0].value in CLAUSE_WORDS and not named


def _margin(line: Sequence[Token], stack: Sequence[Token], goes_on: bool) -> str:
    closing = 0
    while closing < len(line) and line[closing].type in _CLOSE:
        closing += 1
    depth = max(0, len(stack) - closing)
    return " " * (_INDENT * depth + (_CLAUSE if goes_on and depth == 1 else 0))


def _follow(line: Sequence[Token], stack: list[Token]) -> None:
    for token in line:
        if token.type in _OPEN:
            stack.append(token)
        elif token.type in _CLOSE and stack:
            stack.pop()


def _printed(line: Sequence[Token], bodies: frozenset[int], *, aligned: bool) -> str:
    text = line[0].value.rstrip()
    if aligned and len(line) > 1 and line[1].type not in ("LBRACE", "COMMENT"):
        text = text.ljust(_CLAUSE - 1)
    for at in range(1, len(line)):
        token = line[at]
        text += _gap(line, at, bodies) + (
            token.value.rstrip() if token.type == "COMMENT" else token.value
        )
    return text


def _gap(line: Sequence[Token], at: int, bodies: frozenset[int]) -> str:
    """What stands between token `at` and the one before it."""
    before, token = line[at - 1], line[at]
    if token.type == "COMMENT":
        return "  "
    if before.type == "LBRACE" or token.type == "RBRACE":
        brace = before if before.type == "LBRACE" else token
        empty = before.type == "LBRACE" and token.type == "RBRACE"
        return " " if brace.start in bodies and not empty else ""
    if token.type == "COLON":
        return " " if before.type == "RPAR" else ""
    if token.type in _NO_SPACE_BEFORE or before.type in _NO_SPACE_AFTER:
        return ""
    if before.type == "MINUS" and (at < 2 or _is_unary(line[at - 2])):
        return ""
    called = token.type in ("LPAR", "LSQB") and before.type in ("NAME", "RPAR")
    return "" if called and before.end == token.start else " "


def _is_unary(before_minus: Token) -> bool:
    """Whether a `-` after this token is a sign, not a difference."""
    word = before_minus.keyword is not None and before_minus.value in _BEFORE_SIGN_WORDS
    return word or before_minus.type in _BEFORE_SIGN


def is_formatted(text: str) -> bool:
    """Whether `format_text` would leave the text as it is."""
    try:
        return format_text(text) == text
    except GraftError:
        return False
