"""What the parser wanted, in words, and what was likely meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from graftc.diagnostics import Diagnostic, Note, Source, Span, nearest
from graftc.language.tokens import Token
from graftc.language.vocabulary import ROLES

ITEM_WORDS = ("use", "set", "rule", "operator", "test", "finetune")
CLAUSE_WORDS = (
    "match", "where", "replace", "rewrite", "remove", "skip", "insert", "init", "distill", "expect", "train", "drop",
)  # fmt: skip
_IN_WORDS = {
    "NL": "the end of the line",
    "$END": "the end of the file",
    "NAME": "a name",
    "NUMBER": "a number",
    "PERCENT": "a percentage",
    "STRING": 'a "quoted" text',
    "ELLIPSIS": "`…`",
}
_SIGNS = {
    "DOTS": "..", "DOT": ".", "COMMA": ",", "COLON": ":", "ARROW": "->", "EQUAL": "=", "LPAR": "(", "RPAR": ")",
    "LBRACE": "{", "RBRACE": "}", "LSQB": "[", "RSQB": "]", "BAR": "|",
}  # fmt: skip
_OPERATORS = frozenset(
    [
        "EQ",
        "NE",
        "LE",
        "GE",
        "LT",
        "GT",
        "PLUS",
        "MINUS",
        "STAR",
        "SLASH",
        "REMAINDER",
        "TILDE",
        "OR",
        "AND",
        "IS",
    ]
)
_SYMBOLS = _OPERATORS - {"OR", "AND", "IS"}
_VALUES = frozenset(["NAME", "NUMBER", "PERCENT", "STRING", "LPAR", "LBRACE", "LSQB"])
_SITE_WORDS = ("module", "class", "each")
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_SPLIT = re.compile(r"([a-z]+?)([0-9].*|[A-Z_].*)")


def in_words(expected: Iterable[str]) -> str:
    """The terminals, as a person would say them.

    >>> in_words({"NL", "COMMA"})
    '`,` or the end of the line'
    >>> in_words({"NAME"})
    'a name'
    """
    rest = {t for t in expected if t.isupper() or t == "$END"}
    words: list[str] = []
    if {t.lower() for t in rest} >= set(ITEM_WORDS):
        rest -= {w.upper() for w in ITEM_WORDS}
        words.append("an item (" + ", ".join(f"`{w}`" for w in ITEM_WORDS) + ")")
    if {t.lower() for t in rest} >= set(CLAUSE_WORDS):
        rest -= {w.upper() for w in CLAUSE_WORDS}
        words.append("a clause (" + ", ".join(f"`{w}`" for w in CLAUSE_WORDS) + ")")
    if rest >= {"NAME", "NUMBER", "LPAR"}:
        rest -= _VALUES | {"NOT", "MINUS", "MAYBE"}
        words.append("a value")
    keywords = sorted(t.lower() for t in rest - set(_IN_WORDS) - set(_SIGNS) - _OPERATORS)
    words += [f"`{w}`" for w in keywords[:10]]
    words += [_IN_WORDS[t] for t in ("NAME", "NUMBER", "PERCENT", "STRING") if t in rest]
    words += [f"`{_SIGNS[t]}`" for t in _SIGNS if t in rest]
    operators = rest & _OPERATORS
    if len(operators) > 2:
        words.append("an operator")
    else:
        words += [f"`{t.lower()}`" for t in sorted(operators)]
    words += [_IN_WORDS[t] for t in ("ELLIPSIS", "NL", "$END") if t in rest]
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"


def no_value(source: Source) -> Diagnostic:
    """`--set name=` with nothing after it."""
    return Diagnostic("G010", "there is no value", span=Span(source, 0, 1), wanted="a value")


def unexpected(
    tokens: Sequence[Token], at: int, expected: frozenset[str], before: frozenset[str], start: str
) -> Diagnostic:
    """The diagnostic for token `at` (past the last: the end of the text).

    `expected` are the terminals that could stand there, `before` those that could stand in
    place of the token before it, which may be where the mistake really is.
    """
    end = at >= len(tokens)
    token = tokens[min(at, len(tokens) - 1)]
    wanted = in_words(expected)
    span = Span(token.source, token.end, token.end + 1) if end else token.span
    if token.type == "NL" and not token.value and not end:  # supplied before `}` or at the end
        following = tokens[at + 1] if at + 1 < len(tokens) else None
        span = following.span if following else Span(token.source, token.end, token.end + 1)
        found = f"`{following.value}`" if following else "end of the file"
        end = following is None
    elif end:
        found = "end of the file" if start == "start" else "end of the value"
    elif token.type == "NL":
        found = "end of the line"
        span = Span(token.source, token.start, token.start + 1)
    else:
        found = f"`{token.value[:40]}`"
    opened = _open_bracket(tokens[:at])
    notes: list[Note] = []
    help = None if at >= len(tokens) else _suggestion(tokens, at, expected, before)
    if site := _site_among_ops(tokens, at):
        wanted, help = "y = op(…)", site_needs_no_braces(site)
    if opened is not None and (end or _runs_over(token, opened)):
        closing = _CLOSES[opened.value]
        notes.append(Note(f"`{opened.value}` is opened here and not closed", opened.span))
        help = f"close it with `{closing}`"
    return Diagnostic(
        "G010", f"unexpected {found}", span=span, wanted=wanted, notes=tuple(notes), help=help
    )


def site_needs_no_braces(pattern: str) -> str:
    """What to do about `match { a = self_attention … }`."""
    return (
        f"`{{ … }}` is for ops; a site stands without: write `match {pattern}` on a line of its own"
    )


def _site_among_ops(tokens: Sequence[Token], at: int) -> str | None:
    """The line of `match { … }` in which token `at` stands, where it names a site: `a = mlp in blocks odd`."""
    first = at
    while first and tokens[first - 1].type not in ("NL", "LBRACE"):
        first -= 1
    opening = first - 1
    while opening >= 0 and tokens[opening].type != "LBRACE":
        opening -= 1
    if opening < 1 or tokens[opening - 1].value != "match" or at >= len(tokens):
        return None
    made = next((t for b, t in pairwise(tokens[first:at]) if b.type == "EQUAL"), None)
    if made is None or made.value not in (*ROLES, *_SITE_WORDS):
        return None
    end = at
    while end < len(tokens) and tokens[end].type not in ("NL", "RBRACE"):
        end += 1
    return Span(tokens[at].source, tokens[first].start, tokens[end - 1].end).text


def _open_bracket(tokens: Sequence[Token]) -> Token | None:
    stack: list[Token] = []
    for token in tokens:
        if token.value in _CLOSES and token.type != "STRING":
            stack.append(token)
        elif token.type in ("RPAR", "RSQB", "RBRACE") and stack:
            stack.pop()
    return stack[-1] if stack else None


def _runs_over(token: Token, opened: Token) -> bool:
    """Whether the parser went past the line where a `(` or `[` was left open, or met a new item."""
    if opened.value != "{":
        return token.span.line > opened.span.line
    return token.value in ITEM_WORDS


def _suggestion(
    tokens: Sequence[Token], at: int, expected: frozenset[str], before: frozenset[str]
) -> str | None:
    token = tokens[at]
    last = tokens[at - 1] if at else None
    if last is not None and last.type == "NAME":
        # `expct 14` reads as one more name in the clause above, `in bloks all` as a role
        words = (
            (*CLAUSE_WORDS, *ITEM_WORDS) if _first_on_line(tokens, at - 1) else _keywords(before)
        )
        word = nearest(last.value, words)
        if word and word != last.value:
            return f"write `{word}` in place of `{last.value}`"
        if tokens[at - 2].value == "in" and (token.value == "." or token.type == "NUMBER"):
            # `in layers 1..4`, `in model.layers 1..4`: the chain's name in place of `blocks`
            return 'blocks are `in blocks 1..4`, and of one chain of several `in blocks of "CHAIN" 1..4`'
    if token.type == "EQ" and "EQUAL" in expected:
        return "write `=`; `==` compares"
    if token.type == "EQUAL" and last is not None:
        if "EQ" in expected:
            return "write `==` to compare"
        if last.keyword and last.type != "NAME":
            return f'write `"{last.value}" = …`: a name that is also a clause is quoted'
    if token.type in ("EQ", "NE", "LT", "LE", "GT", "GE"):
        return "compare two values at a time, joined by `and`"
    if not (token.keyword or token.type == "NAME"):
        return None
    keywords = _keywords(expected)
    split = _SPLIT.fullmatch(token.value)
    if split and split.group(1) in keywords:
        return f"write `{split.group(1)} {split.group(2)}`, apart"
    word = nearest(token.value, keywords)
    if word and word != token.value:
        return f"write `{word}` in place of `{token.value[:40]}`"
    if "NL" in expected:
        word = nearest(token.value, CLAUSE_WORDS)
        return f"begin `{word}` on a line of its own" if word else "end the line before it"
    return None


def _keywords(terminals: Iterable[str]) -> list[str]:
    return [
        t.lower() for t in terminals if t not in _IN_WORDS and t not in _SIGNS and t not in _SYMBOLS
    ]


def _first_on_line(tokens: Sequence[Token], at: int) -> bool:
    return at == 0 or tokens[at - 1].type in ("NL", "LBRACE", "RBRACE")
