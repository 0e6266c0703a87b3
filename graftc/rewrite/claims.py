"""Claims: what an edit rewires, and which edits cannot both be applied."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from graftc.diagnostics import Diagnostic, GraftError, Note, Span


@dataclass(frozen=True)
class Claim:
    """The calls that an edit rewires, by module path; `inside`: it also takes what lies below them.

    `replace a` claims site a and all below it; `parallel(a, b)` the call edges of a and b only.
    """

    rule: str
    span: Span
    paths: tuple[str, ...]
    inside: bool


def check_claims(claims: list[Claim]) -> None:
    """Raise a GraftError for each pair of claims that are equal or that cross."""
    problems: list[Diagnostic] = []
    for j, second in enumerate(claims):
        for first in claims[:j]:
            where = _conflict(first, second)
            if where is not None:
                problems.append(
                    Diagnostic(
                        "G340",
                        f"rules `{first.rule}` and `{second.rule}` both claim {where}",
                        span=second.span,
                        label="second claim",
                        notes=(Note(f"first claimed by rule `{first.rule}`", first.span),),
                        help="narrow one of the two block sets, for example with `except {…}`",
                    )
                )
    if problems:
        raise GraftError(*_one_per_pair(problems))


def _one_per_pair(problems: list[Diagnostic]) -> list[Diagnostic]:
    seen: dict[tuple[str, str], Diagnostic] = {}
    for p in problems:
        key = (str(p.span), str(p.notes[0].span))
        seen.setdefault(key, p)
    return list(seen.values())


def _conflict(a: Claim, b: Claim) -> str | None:
    for x in a.paths:
        for y in b.paths:
            if x == y:
                return x
            if (a.inside and y.startswith(x + ".")) or (b.inside and x.startswith(y + ".")):
                return y if y.startswith(x + ".") else x
    return None


def inner_first(claims: list[Claim]) -> list[int]:
    """Indices of claims so that one inside another's region comes before it."""
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(claims)))
    for i, a in enumerate(claims):
        for j, b in enumerate(claims):
            if i != j and any(y.startswith(x + ".") for x in b.paths for y in a.paths):
                order.add_edge(i, j)
    return list(nx.lexicographical_topological_sort(order))
