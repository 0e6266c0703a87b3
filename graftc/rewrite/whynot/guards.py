"""Which parts of `where` a place does not satisfy, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from graftc.diagnostics import GraftError
from graftc.language.evaluate import evaluate, holds, shown
from graftc.language.rules import Expr, Fact, Literal_, Operation
from graftc.operators.spec import Value
from graftc.program.analysis import Site
from graftc.rewrite.whynot.change import Change

_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def guard_changes(where: Expr | None, bindings: Mapping[str, Site]) -> list[Change]:
    """One change for each part of `where` that fails here."""
    found: list[Change] = []
    for part in _parts(where):

        def value(fact: Fact) -> Value:
            facts = bindings[fact.binding.split(".")[0]].facts
            if fact.name not in facts:
                raise _Absent(fact)
            return facts[fact.name]

        try:
            verdict = holds(part, value)
        except _Absent as absent:
            found.append(_absent(part, absent.fact, bindings))
            continue
        except GraftError as error:
            found.append(Change("guard", 1.5, error.diagnostics[0].message, part.span))
            continue
        if not verdict.ok:
            cost = 1.0 + 0.5 * _distance(part, value)
            found.append(Change("guard", cost, verdict.reason, part.span, _fix(part, value)))
    return found


class _Absent(Exception):
    """A fact that a site has not."""

    def __init__(self, fact: Fact) -> None:
        super().__init__(fact.name)
        self.fact = fact


def _absent(part: Expr, fact: Fact, bindings: Mapping[str, Site]) -> Change:
    site = bindings[fact.binding.split(".")[0]]
    has = ", ".join(sorted(site.facts))
    return Change("guard", 1.5, f"has no `{fact.name}`: it has {has}", part.span)


def _parts(where: Expr | None) -> Iterator[Expr]:
    """The conditions that must all hold."""
    if isinstance(where, Operation) and where.op == "and":
        for part in where.args:
            yield from _parts(part)
    elif where is not None:
        yield where


def _distance(part: Expr, value: Callable[[Fact], Value]) -> float:
    """How far a comparison is from holding, 0 to 1; 1 where that is no number."""
    if not isinstance(part, Operation) or len(part.args) != 2:
        return 1.0
    try:
        left, right = (evaluate(a, value) for a in part.args)
    except GraftError:
        return 1.0
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        return 1.0
    if isinstance(left, bool) or isinstance(right, bool):
        return 1.0
    return min(1.0, abs(left - right) / max(abs(left), abs(right), 1e-12))


def _fix(part: Expr, value: Callable[[Fact], Value]) -> str | None:
    """The guard with its number as it is found."""
    if not isinstance(part, Operation) or part.op not in ("==", *_MIRRORED):
        return f"leave out `{shown(part)}`"
    left, right = part.args
    op = part.op
    if isinstance(left, Literal_) and not isinstance(right, Literal_):
        left, right, op = right, left, _MIRRORED.get(op, op)
    if not isinstance(right, Literal_):
        return f"leave out `{shown(part)}`"
    found = evaluate(left, value)
    op = {"<": "<=", ">": ">="}.get(op, op)
    return f"write `{shown(Operation(op, (left, Literal_(found, right.span)), part.span))}`"
