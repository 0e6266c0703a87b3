"""Every occurrence of a pattern in a graph.

From each value that the pattern's rarest op makes, the match is grown along operands and users, so the time
is that of the candidates and not of the graph. Different nodes of a pattern are different ops of the graph (a
monomorphism); different names of values from outside may be the same value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftc.language.dataflow_ops import OPS, Kind
from graftc.rewrite.dataflow.pattern import (
    GETITEM,
    Anything,
    Fixed,
    Items,
    Node,
    NodeRef,
    Operand,
    Pattern,
    Rest,
    ValueRef,
    Without,
    refs,
)
from graftc.rewrite.dataflow.view import View

_ONE_MORE = frozenset({"unsqueeze", "stack"})
_GETITEM_KINDS: tuple[Kind, ...] = ("value", "number")


@dataclass(frozen=True)
class SiteValue:
    """The call of a bound site: what it is given, and the site itself."""

    args: tuple[Any, ...]
    site: Any


Sites = Mapping[str, Mapping[Any, SiteValue]]
"""Binding → the results of the sites that it may be, with their calls."""


@dataclass(frozen=True, eq=False)
class Occurrence:
    """One way to lay a pattern onto a graph: a value for each node, and what the names outside stand for.

    `sizes`: what the names in shape guards stand for.
    """

    pattern: Pattern
    values: tuple[Any, ...]
    names: Mapping[str, Any]
    sites: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def value(self, name: str) -> Any:
        """What a name of the pattern stands for."""
        result = self.pattern.results.get(name)
        if isinstance(result, NodeRef):
            return self.values[result.index]
        if isinstance(result, ValueRef):
            return self.names[result.name]
        return self.names[name]


def occurrences(
    pattern: Pattern,
    view: View,
    sites: Sites | None = None,
    claimed: Collection[int] = (),
) -> Iterator[Occurrence]:
    """All occurrences of a pattern, in the order of its rarest op's values.

    `claimed`: ids of values that no inner or written node may be; the caller may add to it between two.
    """
    search = _Search(pattern, view, sites or {}, claimed)
    anchor = min(pattern.nodes, key=lambda n: len(search.candidates(n)))
    for value in search.candidates(anchor):
        yield from search.start(anchor, value)


@dataclass(frozen=True)
class _Goal:
    """An operand that must stand for a value."""

    operand: Operand
    actual: Any
    kind: Kind
    rank: int | None


# Goals are a linked list, so that a choice point keeps its own rest without copying.
_Goals = tuple[_Goal, Any] | None


class _Search:
    """The state of one search: what is assigned, undone from `trail` on the way back."""

    def __init__(
        self, pattern: Pattern, view: View, sites: Sites, claimed: Collection[int] = ()
    ) -> None:
        self.pattern, self.view, self.sites, self.claimed = pattern, view, sites, claimed
        self.claims = pattern.inner | pattern.written
        self.assigned: list[Any] = [None] * len(pattern.nodes)
        self.taken: set[int] = set()
        self.names: dict[str, Any] = {}
        self.trail: list[str] = []
        self.without: list[tuple[Without, Any]] = []

    def candidates(self, node: Node) -> Sequence[Any]:
        if node.site:
            return tuple(self.sites.get(node.site, {}))
        found = [self.view.named(op) for op in node.ops]
        return found[0] if len(found) == 1 else [v for f in found for v in f]

    def start(self, node: Node, value: Any) -> Iterator[Occurrence]:
        yield from self.assign(node, value, None)

    # -- growing ---------------------------------------------------------------------------------

    def solve(self, goals: _Goals) -> Iterator[Occurrence]:
        """All ways to reach the goals and then the nodes that are left."""
        mark, waiting = len(self.trail), len(self.without)
        while goals is not None:
            goal, goals = goals
            operand, actual = goal.operand, goal.actual
            if isinstance(operand, NodeRef):
                known = self.assigned[operand.index]
                if known is not None:
                    if known is not actual:
                        break
                elif not self.view.is_value(actual):
                    break
                else:
                    yield from self.assign(self.pattern.nodes[operand.index], actual, goals)
                    break
            elif isinstance(operand, Items):
                more = self.items(operand, goal)
                if more is None:
                    break
                for inner in reversed(more):
                    goals = (inner, goals)
            elif not self.fits(operand, goal):
                break
        else:
            yield from self.next_node()
        self.undo(mark)
        del self.without[waiting:]

    def next_node(self) -> Iterator[Occurrence]:
        """Grow from what is assigned to a node that is not: its users, or those of a value they share."""
        step = self.reachable()
        if step is None:
            yield from self.finish()
            return
        node, values = step
        for value in values:
            yield from self.assign(node, value, None)

    def reachable(self) -> tuple[Node, Sequence[Any]] | None:
        """An unassigned node and its candidates, the fewest first."""
        best: tuple[Node, Sequence[Any]] | None = None
        left = False
        for node in self.pattern.nodes:
            if self.assigned[node.index] is not None:
                continue
            left = True
            for operand in refs(node.operands):
                source: Any = None
                if isinstance(operand, NodeRef):
                    source = self.assigned[operand.index]
                elif isinstance(operand, ValueRef):
                    source = self.names.get(operand.name)
                if source is None or not self.view.is_value(source):
                    continue
                users = self.view.users(source)
                if best is None or len(users) < len(best[1]):
                    best = (node, users)
        if best is None and left:  # joined by a number only, or through a list
            node = next(n for n in self.pattern.nodes if self.assigned[n.index] is None)
            return node, self.candidates(node)
        return best

    def assign(self, node: Node, value: Any, goals: _Goals) -> Iterator[Occurrence]:
        """`node` is `value`, if its op is right: its arguments become goals, in either order if they commute."""
        view, mark = self.view, len(self.trail)
        if id(value) in self.taken:
            return
        if node.index in self.claims and id(value) in self.claimed:
            return
        if node.site:
            call = self.sites.get(node.site, {}).get(value)
            if call is None:
                return
            orders: list[list[_Goal]] = [[]]
            if node.args is not None:
                if len(node.args) > len(call.args):
                    return
                pairs = zip(node.args, call.args, strict=False)
                orders = [[_Goal(o, a, "value", None) for o, a in pairs]]
        else:
            if view.op(value) not in node.ops and view.raw(value)[0] not in node.ops:
                return
            found = self.orders(node, value)
            if found is None:
                self.undo(mark)
                return
            orders = found
        waiting = len(self.without)
        self.assigned[node.index] = value
        self.taken.add(id(value))
        for order in orders:
            rest = goals
            for goal in reversed(order):
                rest = (goal, rest)
            yield from self.solve(rest)
        self.assigned[node.index] = None
        self.taken.discard(id(value))
        self.undo(mark)
        del self.without[waiting:]

    def orders(self, node: Node, value: Any) -> list[list[_Goal]] | None:
        """The goals of a node's arguments, for each order that they may stand in."""
        view = self.view
        actual = view.args(value)
        if actual is None or node.args is None:
            return None
        op = view.op(value)
        word = OPS.get(op)
        if word is None or op not in node.ops:
            plain = view.raw(value)[1] if word is not None else actual
            return self.plain_orders(node, value, plain)
        rank = self.rank_of(op, actual)
        goals: list[_Goal] = []
        for at, operand in enumerate(node.args):
            if isinstance(operand, Rest):
                if not self.bind(operand.name, actual[at:]):
                    return None
                break
            kind = word.parameters[at].kind
            goals.append(_Goal(operand, actual[at], kind, rank))
        if word.commutes is None or word.commutes[1] >= len(goals):
            return [goals]
        i, j = word.commutes
        first, second = goals[i], goals[j]
        other = list(goals)
        other[i] = _Goal(first.operand, second.actual, first.kind, rank)
        other[j] = _Goal(second.operand, first.actual, second.kind, rank)
        return [goals, other]

    def plain_orders(
        self, node: Node, value: Any, actual: tuple[Any, ...]
    ) -> list[list[_Goal]] | None:
        """An op by its ATen name, or a part of a tuple: arguments as they stand."""
        kinds = _GETITEM_KINDS if node.ops == (GETITEM,) else ()
        args = node.args or ()
        goals: list[_Goal] = []
        for at, operand in enumerate(args):
            if isinstance(operand, Rest):
                if not self.bind(operand.name, actual[at:]):
                    return None
                break
            if at >= len(actual):
                return None
            kind: Kind = kinds[at] if at < len(kinds) else "list"
            goals.append(_Goal(operand, actual[at], kind, None))
        else:
            if len(actual) != len(args):
                return None
        keywords = self.view.raw(value)[2]
        named = dict(node.named)
        if set(named) != set(keywords):
            return None
        goals += [_Goal(o, keywords[n], "list", None) for n, o in named.items()]
        return [goals]

    def rank_of(self, op: str, actual: tuple[Any, ...]) -> int | None:
        """The dimensions that negative numbers count from."""
        first = actual[0] if actual else None
        if isinstance(first, tuple) and first:
            first = first[0]
        if not self.view.is_value(first):
            return None
        rank = self.view.rank(first)
        return rank + 1 if rank is not None and op in _ONE_MORE else rank

    # -- what an operand may stand for -------------------------------------------------------------

    def fits(self, operand: Operand, goal: _Goal) -> bool:
        actual = goal.actual
        if isinstance(operand, ValueRef):
            return self.bind(operand.name, actual)
        if isinstance(operand, Fixed):
            if self.view.is_value(actual):
                return False
            return same_constant(operand.value, actual, goal.kind, goal.rank)
        if isinstance(operand, Without):
            self.without.append((operand, actual))
            return True
        return isinstance(operand, Anything)

    def items(self, operand: Items, goal: _Goal) -> list[_Goal] | None:
        actual = goal.actual
        if not isinstance(actual, tuple):
            return None
        given: tuple[Any, ...] = actual
        wanted = operand.items
        spread = next((i for i, o in enumerate(wanted) if isinstance(o, Rest)), None)
        kind: Kind = {"dims": "dim", "list": "number", "values": "value"}.get(goal.kind, "value")  # type: ignore[assignment]
        if spread is None:
            if len(given) != len(wanted):
                return None
            return [_Goal(o, a, kind, goal.rank) for o, a in zip(wanted, given, strict=True)]
        after = len(wanted) - spread - 1
        if len(given) < spread + after:
            return None
        rest = wanted[spread]
        assert isinstance(rest, Rest)
        middle = given[spread : len(given) - after]
        if not self.bind(rest.name, middle):
            return None
        pairs = [*zip(wanted[:spread], given, strict=False)]
        pairs += (
            zip(wanted[spread + 1 :], given[len(given) - after :], strict=True) if after else ()
        )
        return [_Goal(o, a, kind, goal.rank) for o, a in pairs]

    def bind(self, name: str, actual: Any) -> bool:
        """The name stands for this; False where it stands for something else already."""
        missing = object()
        known = self.names.get(name, missing)
        if known is not missing:
            return same(known, actual)
        self.names[name] = actual
        self.trail.append(name)
        return True

    def undo(self, mark: int) -> None:
        while len(self.trail) > mark:
            del self.names[self.trail.pop()]

    def finish(self) -> Iterator[Occurrence]:
        """All is assigned: what comes from outside is not made inside, and what must not be is not."""
        for name in self.pattern.inputs:
            if any(id(v) in self.taken for v in opened(self.names.get(name))):
                return
        if any(self.is_made_by(w.pattern, actual) for w, actual in self.without):
            return
        sites = {
            n.site: self.sites[n.site][self.assigned[n.index]].site
            for n in self.pattern.nodes
            if n.site
        }
        yield Occurrence(self.pattern, tuple(self.assigned), dict(self.names), sites)

    def is_made_by(self, pattern: Pattern, actual: Any) -> bool:
        """Whether a value is the last node of a pattern, names meaning what they mean around it."""
        if not pattern.nodes or not self.view.is_value(actual):
            return False
        inner = _Search(pattern, self.view, self.sites)
        inner.names = dict(self.names)
        for node in self.pattern.nodes:
            for name in node.names:
                inner.names[name] = self.assigned[node.index]
        return next(inner.start(pattern.nodes[-1], actual), None) is not None


def opened(value: Any) -> Iterator[Any]:
    """The values in a list, or the value."""
    if isinstance(value, tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from opened(item)
    else:
        yield value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same value, number or list."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        pairs = zip(one, other, strict=False)  # pyright: ignore[reportUnknownVariableType]
        return len(one) == len(other) and all(same(a, b) for a, b in pairs)  # pyright: ignore[reportUnknownArgumentType]
    plain = (int, float, bool, str)
    return isinstance(one, plain) and isinstance(other, plain) and equal(one, other)


def equal(one: Any, other: Any) -> bool:
    """Numbers to single precision (a written 0.7071068 is the root of a half); words exactly."""
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=0.0)
    return type(one) is type(other) and one == other


def same_constant(wanted: Any, actual: Any, kind: Kind, rank: int | None) -> bool:
    """Whether a written constant is what stands there, as its parameter's kind compares."""
    if wanted is None or actual is None:
        return wanted is actual
    if kind in ("dim", "dims"):
        one, other = _dims(wanted, rank), _dims(actual, rank)
        if one is None or other is None:
            return False
        return one == other
    if isinstance(actual, tuple):
        return all(same_constant(wanted, a, kind, rank) for a in actual)  # pyright: ignore[reportUnknownVariableType]
    if kind == "flag":
        return bool(wanted) == bool(actual)
    return equal(wanted, actual)


def _dims(value: Any, rank: int | None) -> tuple[int, ...] | None:
    items: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(i, int) for i in items):
        return None
    return tuple(i % rank if rank else i for i in items)


def leak(occurrence: Occurrence, view: View, returned: frozenset[int] = frozenset()) -> Leak | None:
    """The first inner value that something outside the match uses, or that the model returns."""
    inside = {id(v) for v in occurrence.values}
    for index in sorted(occurrence.pattern.inner):
        value = occurrence.values[index]
        for user in view.users(value):
            if id(user) not in inside:
                return Leak(occurrence.pattern.nodes[index], value, user)
        if getattr(value, "index", None) in returned:
            return Leak(occurrence.pattern.nodes[index], value, None)
    return None


@dataclass(frozen=True, eq=False)
class Leak:
    """An inner value that is used outside: by `user`, or by the model's caller (None)."""

    node: Node
    value: Any
    user: Any
