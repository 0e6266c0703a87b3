"""Text → tokens, as grammar/graft.lark says.

A word is taken whole and keeps both readings, NAME and keyword; the parser decides between
them by what the grammar allows at that point. Mistakes of spelling (an unknown character, a
number that runs into a word, an open string) become diagnostics, and a stand-in token keeps
the parser going, so that the errors further down are found too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftc.diagnostics import Diagnostic, Source, Span

LONGEST_TEXT = 1_000_000
DEEPEST_BRACKETS = 40
_MOST_TOKENS = 150_000
_MOST_ERRORS = 20
_OPENING = frozenset({"LPAR", "LSQB", "LBRACE"})
_CLOSING = frozenset({"RPAR", "RSQB", "RBRACE"})
_LARGEST_DIGITS = 15


@dataclass(slots=True)
class Token:
    """A piece of text. `type` is the terminal; `keyword` is the terminal that a word may also be."""

    type: str
    value: str
    source: Source
    start: int
    end: int
    keyword: str | None = None

    @property
    def span(self) -> Span:
        return Span(self.source, self.start, self.end)


@dataclass(frozen=True)
class Terminals:
    """The grammar's terminals, as the scanner wants them."""

    keywords: Mapping[str, str]
    signs: Mapping[str, str]
    scanner: re.Pattern[str]
    pieces: re.Pattern[str]

    @staticmethod
    def build(
        words: Mapping[str, str], signs: Mapping[str, str], shapes: Mapping[str, str]
    ) -> Terminals:
        """From name → text of keywords and of signs, and name → regular expression of the rest."""
        order = ("COMMENT", "SPACE", "NL", "STRING", "PERCENT", "NUMBER", "NAME", "ELLIPSIS")
        whole = {"NAME": r"(?!\w)"}  # `é` may not follow: the word is reported whole
        parts = [f"(?P<{name}>{shapes[name]}{whole.get(name, '')})" for name in order]
        longest_first = sorted(signs.items(), key=lambda item: -len(item[1]))
        parts += [f"(?P<{name}>{re.escape(text)})" for name, text in longest_first]
        keywords = {text: name for name, text in words.items()}
        spelled = {**{text: name for name, text in signs.items()}, "\n": "NL", "\r\n": "NL"}
        pattern = "|".join(parts)
        pieces = re.compile(
            re.sub(r"\(\?P<\w+>", "(?:", re.sub(r"(?<!\\)\((?!\?)", "(?:", pattern))
        )
        return Terminals(keywords, spelled, re.compile(pattern), pieces)


def scan(source: Source, terminals: Terminals) -> tuple[list[Token], list[Diagnostic]]:
    """Every token, comments and line ends included, and what could not be read.

    Stops at a text or a nesting that is larger than a person writes, before it costs time.
    """
    text, keywords = source.text, terminals.keywords
    tokens: list[Token] = []
    errors: list[Diagnostic] = []
    if len(text) > LONGEST_TEXT:
        return [], [
            _too_long(source, LONGEST_TEXT, f"{LONGEST_TEXT:,} characters", f"{len(text):,}")
        ]
    values = terminals.pieces.findall(text)
    if sum(map(len, values)) != len(text):
        return _scan_with_errors(source, terminals)
    signs, at, depth = terminals.signs, 0, 0
    for (
        value
    ) in values:  # nothing is left out between two pieces, so each begins where the last ends
        position, at = at, at + len(value)
        kind = signs.get(value)
        if kind is None:
            first = value[0]
            if first == " " or first == "\t":
                continue
            kind = _kind_of(first, value)
            if kind == "NUMBER" or kind == "PERCENT":
                too_large = _number_error(source, value, position, at)
                if too_large is not None:
                    errors.append(too_large)
                    value = "1" if kind == "NUMBER" else "1%"
        elif kind in _OPENING:
            depth += 1
            if depth > DEEPEST_BRACKETS:
                return [], [*errors, nested_too_deep(Span(source, position, at))]
        elif kind in _CLOSING:
            depth = max(0, depth - 1)
        tokens.append(Token(kind, value, source, position, at, keywords.get(value)))
        if len(tokens) > _MOST_TOKENS:
            return [], [_too_long(source, at - 1, f"{_MOST_TOKENS:,} words and signs", "more")]
    return tokens, errors


def _kind_of(first: str, value: str) -> str:
    """The terminal of a piece that is no sign, from how it begins."""
    if first in "0123456789":
        return "PERCENT" if value[-1] == "%" else "NUMBER"
    return {'"': "STRING", "#": "COMMENT", ".": "ELLIPSIS", "…": "ELLIPSIS"}.get(first, "NAME")


def _scan_with_errors(source: Source, terminals: Terminals) -> tuple[list[Token], list[Diagnostic]]:
    """As `scan`, piece by piece, where some of the text is none that the language has."""
    text, keywords = source.text, terminals.keywords
    tokens: list[Token] = []
    errors: list[Diagnostic] = []
    match, position, depth = terminals.scanner.match, 0, 0
    while position < len(text):
        found = match(text, position)
        if found is None:
            token, position, error = _unreadable(source, position)
            if token is not None:
                tokens.append(token)
            errors.append(error)
            if len(errors) >= _MOST_ERRORS:
                break
            continue
        kind, value, end = found.lastgroup or "", found.group(), found.end()
        if kind in _OPENING:
            depth += 1
            if depth > DEEPEST_BRACKETS:
                return [], [*errors, nested_too_deep(Span(source, position, end))]
        elif kind in _CLOSING:
            depth = max(0, depth - 1)
        elif kind in ("NUMBER", "PERCENT"):
            too_large = _number_error(source, value, position, end)
            if too_large is not None:
                errors.append(too_large)
                value = "1" if kind == "NUMBER" else "1%"
        if kind != "SPACE":
            tokens.append(Token(kind, value, source, position, end, keywords.get(value)))
        position = end
        if len(tokens) > _MOST_TOKENS:
            most = f"{_MOST_TOKENS:,} words and signs"
            return [], [_too_long(source, position - 1, most, "more")]
    return tokens, errors


def _too_long(source: Source, at: int, most: str, found: str) -> Diagnostic:
    return Diagnostic(
        "G004",
        "the file is too large",
        span=Span(source, at, at + 1),
        wanted=f"at most {most}",
        found=found,
        help='split it, and bring the parts together with `use "part.graft"`',
    )


_WORD = re.compile(r"\w+")
_OPEN_STRING = re.compile(r'"(?:[^"\\\n\r]++|\\[^\n\r])*+"?|"[^\n\r]*')
_LOOKALIKES = {
    "“": '"', "”": '"', "‘": '"', "’": '"', "'": '"', "`": '"', "\u00a0": "a space", "–": "-", "—": "-",
    "−": "-", "×": "*", "÷": "/", "≥": ">=", "≤": "<=", "≠": "!=", "→": "->", ";": "a new line",
    "&": "and", "!": "not", "\r": "a line feed", "\t": "a space", "^": "a product",
}  # fmt: skip


def _unreadable(source: Source, at: int) -> tuple[Token | None, int, Diagnostic]:
    text, sign = source.text, source.text[at]
    if sign == '"':
        end = (_OPEN_STRING.match(text, at) or re.compile(".").match(text, at)).end()  # type: ignore[union-attr]
        closed = end - at > 1 and text[end - 1] == '"'
        if closed:
            message, help = (
                "unknown escape in a string",
                'write `\\\\` for a backslash, `\\"` for a quote',
            )
        else:
            message, help = "the string is not closed", 'end it with `"` on the same line'
        token = Token("STRING", '""', source, at, end)
        return token, end, Diagnostic("G005", message, span=Span(source, at, end), help=help)
    word = _WORD.match(text, at)
    if word is None:
        name = unicodedata.name(sign, "a control character")
        instead = _LOOKALIKES.get(sign)
        shown = f"`{sign}`" if sign.isprintable() else "a character that cannot be shown"
        return None, at + 1, Diagnostic(
            "G002",
            f"unexpected character {shown} (U+{ord(sign):04X}, {name.lower()})",
            span=Span(source, at, at + 1),
            help=f"write {instead if instead and instead.startswith('a ') else f'`{instead}`'}"
            if instead
            else "take it out; only strings and comments may hold such characters",
        )  # fmt: skip
    span = Span(source, at, word.end())
    if sign.isascii() and sign.isdigit():
        return Token("NUMBER", "1", source, at, word.end()), word.end(), _run_on(span)
    odd = next(c for c in word.group() if not (c.isascii() and (c.isalnum() or c == "_")))
    return Token("NAME", word.group(), source, at, word.end()), word.end(), Diagnostic(
        "G002",
        f"`{word.group()[:40]}` holds `{odd}` (U+{ord(odd):04X}, {unicodedata.name(odd, '?').lower()})",
        span=span,
        wanted="a name of the letters a-z, A-Z, digits and `_`",
        help="spell it in plain letters",
    )  # fmt: skip


def _run_on(span: Span) -> Diagnostic:
    digits = re.match(r"[0-9_]*[0-9]", span.text)
    number = digits.group().replace("_", "") if digits else ""
    rest = span.text[digits.end() :] if digits else ""
    if rest in ("K", "m", "g", "G", "b", "B"):
        help = f"write `{number}{'k' if rest == 'K' else 'M'}`; the suffixes are k (thousand) and M (million)"
    elif not rest:
        help = f"write `{number}`"
    elif rest in ("of", "step", "blocks", "and", "or", "by"):
        help = f"write `{number} {rest}`"
    else:
        help = "put a space after the number, or start the name with a letter"
    return Diagnostic(
        "G003", f"the number runs into a word: `{span.text[:40]}`", span=span, help=help
    )


def _number_error(source: Source, value: str, start: int, end: int) -> Diagnostic | None:
    """A number that no float or no useful integer holds: before int() meets 10 MB of digits."""
    mantissa, _, exponent = value.rstrip("kM%").replace("E", "e").partition("e")
    if len(mantissa.replace(".", "")) <= _LARGEST_DIGITS and abs(int(exponent[:5] or "0")) <= 30:
        return None
    return Diagnostic(
        "G006",
        "the number is too large" if len(value) < 40 else f"the number has {len(value)} digits",
        span=Span(source, start, end),
        wanted=f"at most {_LARGEST_DIGITS} digits, and an exponent within ±30",
    )


_CANNOT_END = frozenset(
    [
        "COMMA",
        "LBRACE",
        "EQUAL",
        "PLUS",
        "MINUS",
        "STAR",
        "SLASH",
        "REMAINDER",
        "EQ",
        "NE",
        "LE",
        "GE",
        "LT",
        "GT",
        "TILDE",
        "BAR",
        "ARROW",
        "COLON",
    ]
)
_CANNOT_START = frozenset(
    [
        "COMMA",
        "LBRACE",
        "EQUAL",
        "PLUS",
        "STAR",
        "SLASH",
        "REMAINDER",
        "EQ",
        "NE",
        "LE",
        "GE",
        "LT",
        "GT",
        "TILDE",
        "BAR",
        "ARROW",
        "COLON",
        "DOTS",
        "RPAR",
        "RSQB",
    ]
)
_JOINING = frozenset({"and", "or"})


def lay_out(tokens: Sequence[Token]) -> list[Token]:
    """Without comments, and with NL only where a line really ends.

    Raises nothing: brackets that do not match are for the parser to report.
    """
    result: list[Token] = []
    inside = 0
    pending: Token | None = None
    for token in tokens:
        kind = token.type
        if kind == "COMMENT":
            continue
        if kind == "NL":
            pending = pending or token
            continue
        if result and result[-1].type != "NL":
            last = result[-1]
            if kind == "RBRACE" and not inside and last.type != "LBRACE":
                result.append(Token("NL", "", token.source, last.end, last.end))
            elif pending and not inside and _ends_line(last, token):
                result.append(Token("NL", "\n", token.source, pending.start, pending.end))
        pending = None
        if kind == "LPAR" or kind == "LSQB":
            inside += 1
        elif (kind == "RPAR" or kind == "RSQB") and inside:
            inside -= 1
        result.append(token)
    if result and result[-1].type != "NL":
        last = result[-1]
        result.append(Token("NL", "", last.source, last.end, last.end))
    return result


def _ends_line(last: Token, following: Token) -> bool:
    return not (
        last.type in _CANNOT_END
        or following.type in _CANNOT_START
        or (last.keyword and last.value in _JOINING)
        or (following.keyword and following.value in _JOINING)
    )


def nested_too_deep(span: Span) -> Diagnostic:
    """The diagnostic for brackets or operators inside one another without end."""
    return Diagnostic(
        "G007",
        "nested too deep",
        span=span,
        wanted=f"at most {DEEPEST_BRACKETS} levels",
        help="split it: several `where` lines are joined by `and`",
    )
