"""Builds the syntax tree of block sets, expressions and statements: see build.py.

The parser keeps every token, so a node's span runs from its first child to its last; a
closing NL is no part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

from graftc.diagnostics import GraftError, Span
from graftc.language import syntax as s
from graftc.language.tokens import Token, nested_too_deep

Children = list[Any]
_DEEPEST = 100


def span_of(children: Children) -> Span:
    """From the first child to the last but a closing NL."""
    last = children[-1]
    if isinstance(last, Token) and last.type == "NL" and len(children) > 1:
        last = children[-2]
    first_span, last_span = cast(Span, children[0].span), cast(Span, last.span)
    return Span(first_span.source, first_span.start, last_span.end)


def nodes(children: Children, *kinds: type) -> tuple[Any, ...]:
    """The children that are nodes (of the given kinds), lines spread out."""
    found: list[Any] = []
    for child in children:
        if isinstance(child, list):
            found += nodes(cast(Children, child), *kinds)
        elif not isinstance(child, Token) and (not kinds or isinstance(child, kinds)):
            found.append(child)
    return tuple(found)


def index_of(children: Children, kind: str) -> int:
    """Where the first token of a kind stands."""
    return next(i for i, c in enumerate(children) if isinstance(c, Token) and c.type == kind)


def name_of(token: Token) -> s.Name:
    return s.Name(token.value, token.span)


def string(token: Token) -> str:
    """The text between the quotes."""
    return re.sub(r"\\(.)", r"\1", token.value[1:-1])


def deeper(span: Span, *parts: Any) -> int:
    """One level more than the deepest part. Raises GraftError where that is too deep to walk."""
    depth = 1 + max((cast(int, p.depth) for p in parts), default=0)
    if depth > _DEEPEST:
        raise GraftError(nested_too_deep(span))
    return depth


def number(text: str) -> int | float:
    """A number as written.

    >>> number("8k"), number("1.5"), number("0.5k"), number("1e-3"), number("2M")
    (8000, 1.5, 500, 0.001, 2000000)
    """
    factor = {"k": 1000, "M": 1_000_000}.get(text[-1], 1)
    digits = text[:-1] if factor > 1 else text
    if digits.isdigit():
        return int(digits) * factor
    value = round(float(digits) * factor, 6) if factor > 1 else float(digits)
    written_whole = factor > 1 or "e" in digits.lower()
    return int(value) if written_whole and value.is_integer() else value


class Line(list[Any]):
    """The items of one line of a clause; `nodes` spreads it into the clause."""

    def __init__(self, children: Children, span: Span) -> None:
        super().__init__(children)
        self.span = span


@dataclass(frozen=True)
class Word:
    """`then ROLE`, `in ROLE`, `half`: a word that only its parent can place."""

    kind: str
    token: Token
    span: Span


@dataclass(frozen=True)
class Names:
    """`a, b`."""

    names: tuple[s.Name, ...]
    span: Span


def amount_of(child: Any) -> Any:
    return None if isinstance(child, Word) else child


class ValueBuilder:
    """The callbacks for what stands inside clauses."""

    # -- which blocks ------------------------------------------------------------------------

    def choice(self, c: Children) -> s.Choice:
        chain = s.Text(string(c[1]), c[1].span) if len(c) > 1 else None
        return s.Choice(chain, c[-1], span_of(c))

    def block_word(self, c: Children) -> s.BlockWord:
        return s.BlockWord(c[0].value, c[0].span)

    def block_end(self, c: Children) -> s.BlockEnd:
        return s.BlockEnd(c[0].value == "first", amount_of(c[1]), span_of(c))

    def range(self, c: Children) -> s.BlockRange:
        return s.BlockRange(c[0], c[2] if len(c) > 1 else None, None, span_of(c))

    def block_step(self, c: Children) -> s.BlockRange:
        return s.BlockRange(c[0].first, c[0].last, c[2], span_of(c))

    def block_every(self, c: Children) -> s.BlockEvery:
        return s.BlockEvery(c[0], c[3], c[5] if len(c) > 4 else None, span_of(c))

    def block_measured(self, c: Children) -> s.BlockMeasured:
        return s.BlockMeasured(c[0].value == "top", amount_of(c[1]), c[3], span_of(c))

    def block_except(self, c: Children) -> s.BlockExcept:
        return s.BlockExcept(c[0], c[2], span_of(c))

    def half(self, c: Children) -> Word:
        return Word("half", c[0], c[0].span)

    def name(self, c: Children) -> s.Name:
        return name_of(c[0])

    # -- expressions -------------------------------------------------------------------------

    def number(self, c: Children) -> s.Number:
        return s.Number(number(c[0].value), c[0].span)

    def percent(self, c: Children) -> s.Percent:
        return s.Percent(float(c[0].value[:-1]) / 100, c[0].span)

    def text(self, c: Children) -> s.Text:
        return s.Text(string(c[0]), c[0].span)

    def path(self, c: Children) -> s.Path:
        return s.Path(tuple(name_of(t) for t in c[::2]), span_of(c))

    def names(self, c: Children) -> Names:
        return Names(tuple(name_of(t) for t in c[::2]), span_of(c))

    def binary(self, c: Children) -> s.Binary:
        span = span_of(c)
        return s.Binary(c[1].value, c[0], c[2], span, deeper(c[1].span, c[0], c[2]))

    def unary(self, c: Children) -> s.Unary:
        return s.Unary(c[0].value, c[1], span_of(c), deeper(c[0].span, c[1]))

    def is_kind(self, c: Children) -> s.IsKind:
        return s.IsKind(c[0], name_of(c[2]), span_of(c), deeper(c[1].span, c[0]))

    def has_shape(self, c: Children) -> s.HasShape:
        return s.HasShape(c[0], c[2], span_of(c), deeper(c[1].span, c[0], c[2]))

    def maybe(self, c: Children) -> s.Maybe:
        return s.Maybe(c[1], span_of(c), deeper(c[0].span, c[1]))

    def paren(self, c: Children) -> s.Expr:
        return replace(
            c[1], span=span_of(c)
        )  # what stands around it begins and ends at its brackets

    def call(self, c: Children) -> s.Call:
        arguments = nodes(c[1:])
        return s.Call(c[0], arguments, span_of(c), deeper(c[1].span, c[0], *arguments))

    def positional(self, c: Children) -> s.Expr:
        return c[0]

    def named(self, c: Children) -> s.Named:
        return s.Named(name_of(c[0]), c[2], span_of(c))

    def spread(self, c: Children) -> s.Spread:
        return s.Spread(name_of(c[0]), span_of(c))

    def alternatives(self, c: Children) -> s.Alternatives:
        choices = nodes(c)
        return s.Alternatives(choices, span_of(c), deeper(c[0].span, *choices))

    def braces(self, c: Children) -> s.Braces:
        items = nodes(c)
        return s.Braces(items, span_of(c), deeper(c[0].span, *items))

    def item_value(self, c: Children) -> s.Expr:
        return c[0]

    def item_range(self, c: Children) -> s.RangeItem:
        step = c[4] if len(c) > 3 else None
        return s.RangeItem(c[0], c[2], step, span_of(c), deeper(c[1].span, c[0], c[2]))

    def item_pair(self, c: Children) -> s.Pair:
        return s.Pair(name_of(c[0]), c[2], span_of(c), deeper(c[1].span, c[2]))

    def list(self, c: Children) -> s.ListOf:
        items = nodes(c)
        return s.ListOf(items, span_of(c), deeper(c[0].span, *items))

    def dim_product(self, c: Children) -> s.DimProduct:
        return s.DimProduct(tuple(name_of(t) for t in c[1:-1]), span_of(c))

    def assign(self, c: Children) -> s.Assign:
        return s.Assign(c[0].names, c[2], span_of(c))

    def returns(self, c: Children) -> s.Returns:
        return s.Returns(nodes(c), span_of(c))
