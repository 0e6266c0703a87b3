"""Which parts of `where` a place does not satisfy, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from graftc.diagnostics import GraftError
from graftc.language.evaluate import evaluate, holds, shown
from graftc.language.rules import Expr, Fact, Operation
from graftc.operators.spec import Value
from graftc.program.analysis import Analysis, Site
from graftc.program.measured import FAMILY
from graftc.rewrite.block_parts import inner_site
from graftc.rewrite.facts import site_fact
from graftc.rewrite.whynot.change import Change
from graftc.rewrite.whynot.guard_edits import guard_edit, without_guard


def guard_changes(
    where: Expr | None,
    bindings: Mapping[str, Site],
    analysis: Analysis,
    others: Sequence[Mapping[str, Site]] = (),
) -> list[Change]:
    """One change for each part of `where` that fails here. `others`: what is selected as it is, and should stay so."""
    found: list[Change] = []
    parts = list(_parts(where))
    for part in parts:
        value = _facts(bindings, analysis)
        try:
            verdict = holds(part, value)
        except _Absent as absent:
            change = _absent(part, absent.fact, bindings)
            found.append(change.edited(without_guard(part.span)))
            continue
        except GraftError as error:
            if error.diagnostics[0].code == "G135":
                continue  # not measured: nothing is known of the place, and the error itself says so
            change = Change("guard", 1.5, error.diagnostics[0].message, part.span)
            found.append(change.edited(without_guard(part.span)))
            continue
        if not verdict.ok:
            cost = 1.0 + 0.5 * _distance(part, value)
            change = Change("guard", cost, verdict.reason, part.span, f"leave out `{shown(part)}`")
            edits = guard_edit(part, value, wider=bool(others), alone=len(parts) == 1)
            found.append(change.edited(edits))
    return found


def _facts(bindings: Mapping[str, Site], analysis: Analysis) -> Callable[[Fact], Value]:
    def value(fact: Fact) -> Value:
        binding, _, part = fact.binding.partition(".")
        site = bindings[binding]
        site = inner_site(analysis, site, part, fact.span) if part else site
        if fact.name not in site.facts and fact.name not in FAMILY:
            raise _Absent(fact)
        return site_fact(site, fact)

    return value


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
