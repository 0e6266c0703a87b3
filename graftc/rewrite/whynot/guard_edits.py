"""Edits of `where`: a condition with another number, turned round, wider by a value, or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import lru_cache

from graftc.diagnostics import GraftError, Source, Span, TextEdit
from graftc.language import syntax as s
from graftc.language.evaluate import evaluate, holds, shown
from graftc.language.parser import parse
from graftc.language.rules import Expr, Fact, Literal_, Operation
from graftc.operators.spec import Value

_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_WITH_EQUAL = {"<": "<=", ">": ">="}
_OUTWARDS = {">=": ROUND_FLOOR, "<=": ROUND_CEILING}
_LONG = 8
Values = Callable[[Fact], Value]


def guard_edit(part: Expr, value: Values, wider: bool, alone: bool) -> tuple[TextEdit, ...]:
    """The edit that makes a condition hold where facts have these values.

    `wider`: it holds at other places, and must go on doing so. `alone`: nothing is joined to it by `and`.
    """
    made = _holding(part, value, wider)
    if made is None:
        return without_guard(part.span)
    bracketed = not alone and isinstance(made, Operation) and made.op == "or"
    text = shown(made)
    return (TextEdit(part.span, f"({text})" if bracketed else text),)


def _holding(part: Expr, value: Values, wider: bool) -> Expr | None:
    """A condition like this one that holds; None where it has to go."""
    if not isinstance(part, Operation):
        return None if wider else Operation("not", (part,), part.span)
    if part.op == "not":
        return None if wider else part.args[0]
    if part.op == "or":
        return _one_of(part, value, wider)
    other = _with_number(part, value)
    if other is None or not wider or part.op != "==":
        return other
    return Operation("or", (part, other), part.span)


def _one_of(part: Operation, value: Values, wider: bool) -> Expr | None:
    """The first condition of several that can be made to hold, in its place or beside it."""
    for at, arg in enumerate(part.args):
        made = _holding(arg, value, False)
        if made is not None and _true(made, value):
            args = (*part.args, made) if wider else (*part.args[:at], made, *part.args[at + 1 :])
            return Operation("or", args, part.span)
    return None


def _with_number(part: Operation, value: Values) -> Expr | None:
    """A comparison with the value that is found."""
    if part.op not in ("==", *_MIRRORED):
        return None
    left, right = part.args
    op = part.op
    if isinstance(left, Literal_) and not isinstance(right, Literal_):
        left, right, op = right, left, _MIRRORED.get(op, op)
    if not isinstance(right, Literal_):
        return None
    op = _WITH_EQUAL.get(op, op)
    found = Literal_(_short(evaluate(left, value), op), right.span)
    return Operation(op, (left, found), part.span)


def _short(value: Value, op: str) -> Value:
    """A measured number to four figures, rounded outwards: the place that it comes from is in."""
    if not isinstance(value, float) or op not in _OUTWARDS or len(str(value)) <= _LONG:
        return value
    return float(Context(prec=4, rounding=_OUTWARDS[op]).create_decimal(value))


def _true(expr: Expr, value: Values) -> bool:
    try:
        return holds(expr, value).ok
    except GraftError:
        return False


# -- leaving a condition out -----------------------------------------------------------------------------


def without_guard(span: Span | None) -> tuple[TextEdit, ...]:
    """The `where` clause that holds a condition, without it; without the clause where it has no other."""
    found = _clause(span) if span is not None else None
    if found is None or span is None:
        return ()
    clause, parts = found
    at = next((i for i, p in enumerate(parts) if p.start <= span.start and span.end <= p.end), None)
    if at is None:
        return ()
    if len(parts) == 1:
        return (TextEdit(_whole_line(clause), ""),)
    if at == 0:
        return (TextEdit(Span(span.source, parts[0].start, parts[1].start), ""),)
    return (TextEdit(Span(span.source, parts[at - 1].end, parts[at].end), ""),)


def _clause(span: Span) -> tuple[Span, tuple[Span, ...]] | None:
    """The clause around a place, and the conditions that it joins."""
    for clause, parts in _clauses(span.source):
        if clause.start <= span.start and span.end <= clause.end:
            return clause, parts
    return None


@lru_cache(maxsize=4)
def _clauses(source: Source) -> tuple[tuple[Span, tuple[Span, ...]], ...]:
    """Every `where` of a text."""
    rules = (i for i in parse(source).items if isinstance(i, s.RuleItem))
    return tuple(
        (clause.span, tuple(p.span for c in clause.conditions for p in _joined(c)))
        for rule in rules
        for clause in rule.clauses
        if isinstance(clause, s.Where)
    )


def _joined(node: s.Expr) -> Iterator[s.Expr]:
    bracketed = node.span.text.startswith("(")
    if isinstance(node, s.Binary) and node.op == "and" and not bracketed:
        yield from _joined(node.left)
        yield from _joined(node.right)
    else:
        yield node


def _whole_line(span: Span) -> Span:
    """A clause with the line end before it."""
    text = span.source.text
    start = text.rfind("\n", 0, span.start)
    if start >= 0 and not text[start : span.start].strip():
        return Span(span.source, start, span.end)
    return span
