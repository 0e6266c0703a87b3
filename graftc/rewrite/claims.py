"""Claims: what an edit rewires, and which edits cannot both be applied."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from graftc.diagnostics import Diagnostic, GraftError, Note, Span


@dataclass(frozen=True)
class Claim:
    """The calls that an edit rewires, by module path; `inside`: it also takes what lies below them.

    `replace a` claims site a and all below it; `parallel(a, b)` the call edges of a and b only. `kind`
    is the edit's; `after` names the rules whose edits it may touch, as they are made before it. A dataflow
    rule claims `nodes` (a graph's path and a node of it) and the modules that it opens, which are then no calls.
    `weights`: modules that stay and whose weights change.
    """

    rule: str
    span: Span
    paths: tuple[str, ...]
    inside: bool
    kind: str = ""
    after: tuple[str, ...] = ()
    nodes: frozenset[tuple[str, str]] = frozenset()
    opened: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


_FOLLOWS = frozenset(
    {(first, then) for first in ("replace", "insert") for then in ("insert", "parallel")}
)
"""(kind, kind): what can follow what at one site with `after`: the site's call is still there."""


def _earlier(claims: list[Claim]) -> dict[str, set[str]]:
    """Rule → the rules that it comes after, also by way of others."""
    said = nx.DiGraph((c.rule, before) for c in claims for before in c.after)
    said.add_nodes_from(c.rule for c in claims)
    return {c.rule: nx.descendants(said, c.rule) for c in claims}


def _in_order(first: Claim, second: Claim, earlier: dict[str, set[str]]) -> bool:
    """Whether the second says that it comes after the first, and can."""
    return first.rule in earlier[second.rule] and (first.kind, second.kind) in _FOLLOWS


def check_claims(claims: list[Claim]) -> None:
    """Raise a GraftError for each pair of claims that are equal or that cross."""
    problems: list[Diagnostic] = []
    earlier = _earlier(claims)
    for j, second in enumerate(claims):
        for first in claims[:j]:
            where = _conflict(first, second)
            ordered = _in_order(first, second, earlier) or _in_order(second, first, earlier)
            if where is not None and not ordered:
                problems.append(
                    Diagnostic(
                        "G340",
                        f"rules `{first.rule}` and `{second.rule}` both claim {where}",
                        span=second.span,
                        label="second claim",
                        notes=(Note(f"first claimed by rule `{first.rule}`", first.span),),
                        help=_help(first, second),
                    )
                )
    if problems:
        raise GraftError(*_one_per_pair(problems))


def _help(first: Claim, second: Claim) -> str:
    narrow = "narrow one of the two block sets, for example with `except {…}`"
    for a, b in ((first, second), (second, first)):
        if (a.kind, b.kind) in _FOLLOWS and a.rule != b.rule:
            return f"{narrow}, or write `rule {b.rule} after {a.rule}`"
    return narrow


def _one_per_pair(problems: list[Diagnostic]) -> list[Diagnostic]:
    seen: dict[tuple[str, str], Diagnostic] = {}
    for p in problems:
        key = (str(p.span), str(p.notes[0].span))
        seen.setdefault(key, p)
    return list(seen.values())


def _conflict(a: Claim, b: Claim) -> str | None:
    shared = a.nodes & b.nodes
    if shared and (a.opened or b.opened or not (a.paths and b.paths)):
        graph, node = min(shared)
        return f"`{node}` in {graph or 'the root'}"
    for one, other in ((a, b), (b, a)):
        for x in one.paths:
            inside = [g for g, _ in other.nodes if one.inside and _is_in(g, x)]
            opened = [o for o in other.opened if _is_in(x, o)]
            if not other.paths and (inside or opened):
                return x
    for one, other in ((a, b), (b, a)):
        for x in one.weights:
            if other.inside and any(_is_in(x, y) for y in other.paths):
                return x
            if x in other.opened or (one.rule != other.rule and x in other.weights):
                return x
    for x in a.paths:
        for y in b.paths:
            if x == y:
                return x
            if (a.inside and y.startswith(x + ".")) or (b.inside and x.startswith(y + ".")):
                return y if y.startswith(x + ".") else x
    return None


def _is_in(path: str, holder: str) -> bool:
    return path == holder or path.startswith(holder + ".")


def inner_first(claims: list[Claim]) -> list[int]:
    """Indices of claims so that one inside another's region comes before it, and `after` is kept."""
    earlier = _earlier(claims)
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(claims)))
    for i, a in enumerate(claims):
        for j, b in enumerate(claims):
            within = any(y.startswith(x + ".") for x in b.paths for y in a.paths)
            touch = bool(set(a.paths) & set(b.paths))
            if i != j and (within or (touch and a.rule in earlier[b.rule])):
                order.add_edge(i, j)
    return list(nx.lexicographical_topological_sort(order))
