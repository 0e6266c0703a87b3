"""Every occurrence of a pattern in a graph.

From each value that the pattern's rarest op makes, the match is grown along operands and users, so the time
is that of the candidates and not of the graph. Different nodes of a pattern are different ops of the graph (a
monomorphism); different names of values from outside may be the same value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from graftc.language.dataflow_ops import OPS, Kind, OpWord
from graftc.rewrite.dataflow.occurrence import Occurrence, Sites
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
from graftc.rewrite.dataflow.same import opened, same, same_constant
from graftc.rewrite.dataflow.view import View

_ONE_MORE = frozenset({"unsqueeze", "stack"})
_WITH_DIMS = frozenset(
    n for n, w in OPS.items() if any(p.kind in ("dim", "dims") for p in w.parameters)
)
_OF_ITEMS: Mapping[Kind, Kind] = {"dims": "dim", "list": "number", "values": "value"}
_GETITEM_KINDS: tuple[Kind, ...] = ("value", "number")


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


class _Goal(NamedTuple):
    """An operand that must stand for a value."""

    operand: Operand
    actual: Any
    kind: Kind
    rank: int | None


# Goals are a linked list, so that a choice point keeps its own rest without copying.
_Goals = tuple[_Goal, Any] | None


def _first(more: list[_Goal], goals: _Goals) -> _Goals:
    for goal in reversed(more):
        goals = (goal, goals)
    return goals


class _Search:
    """The state of one search: what is assigned and bound, undone from `trail` on the way back.

    A node whose arguments stand in one order only is assigned where it is met; a generator is made only where
    there is a choice: two orders, or several users of a value.
    """

    def __init__(
        self, pattern: Pattern, view: View, sites: Sites, claimed: Collection[int] = ()
    ) -> None:
        self.pattern, self.view, self.sites, self.claimed = pattern, view, sites, claimed
        self.claims = pattern.inner | pattern.written
        self.assigned: list[Any] = [None] * len(pattern.nodes)
        self.taken: set[int] = set()
        self.names: dict[str, Any] = {}
        self.trail: list[str | int] = []
        self.without: list[tuple[Without, Any]] = []

    def candidates(self, node: Node) -> Sequence[Any]:
        if node.site:
            return tuple(self.sites.get(node.site, {}))
        found = [self.view.named(op) for op in node.ops]
        return found[0] if len(found) == 1 else [v for f in found for v in f]

    def start(self, node: Node, value: Any) -> Iterator[Occurrence]:
        """All occurrences in which `node` is `value`, beside what is assigned already."""
        mark = len(self.trail)
        for order in self.assign(node, value) or ():
            yield from self.solve(_first(order, None))
        self.undo(mark)

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
                    continue
                if not self.view.is_value(actual):
                    break
                orders = self.assign(self.pattern.nodes[operand.index], actual)
                if orders is None:
                    break
                if len(orders) > 1:
                    for order in orders:
                        yield from self.solve(_first(order, goals))
                    break
                goals = _first(orders[0], goals)
            elif isinstance(operand, Items):
                more = self.items(operand, goal)
                if more is None:
                    break
                goals = _first(more, goals)
            elif not self.fits(operand, goal):
                break
        else:
            yield from self.next_node()
        self.undo(mark)
        del self.without[waiting:]

    def next_node(self) -> Iterator[Occurrence]:
        """Grow from what is assigned to a node that is not: its users, or those of a value they share."""
        if None not in self.assigned:
            yield from self.finish()
            return
        node, values = self.reachable()
        for value in values:
            yield from self.start(node, value)

    def reachable(self) -> tuple[Node, Sequence[Any]]:
        """An unassigned node and its candidates, the fewest first."""
        best: tuple[Node, Sequence[Any]] | None = None
        left = [n for n in self.pattern.nodes if self.assigned[n.index] is None]
        for node in left:
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
        # Else joined by a number only, or through a list.
        return best or (left[0], self.candidates(left[0]))

    def assign(self, node: Node, value: Any) -> list[list[_Goal]] | None:
        """`node` is `value`, if its op is right: what its arguments must be, for each order that they may stand in."""
        if id(value) in self.taken:
            return None
        if node.index in self.claims and id(value) in self.claimed:
            return None
        orders = self.site_orders(node, value) if node.site else self.orders(node, value)
        if orders:
            self.assigned[node.index] = value
            self.taken.add(id(value))
            self.trail.append(node.index)
        return orders or None

    def site_orders(self, node: Node, value: Any) -> list[list[_Goal]] | None:
        """The goals of what a site is given, None where the value is not the site's."""
        call = self.sites.get(node.site, {}).get(value)
        if call is None:
            return None
        if node.args is None:
            return [[]]
        if len(node.args) > len(call.args):
            return None
        pairs = zip(node.args, call.args, strict=False)
        return [[_Goal(o, a, "value", None) for o, a in pairs]]

    def orders(self, node: Node, value: Any) -> list[list[_Goal]] | None:
        """The goals of a node's arguments, for each order that they may stand in; None where its op is another.

        Numbers are compared here, so that one that does not fit ends an order before its operands are followed.
        """
        view = self.view
        op = view.op(value)
        if op not in node.ops and view.raw(value)[0] not in node.ops:
            return None
        actual = view.args(value)
        if actual is None or node.args is None:
            return None
        word = OPS.get(op)
        if word is None or op not in node.ops:
            plain = view.raw(value)[1] if word is not None else actual
            return self.plain_orders(node, value, plain)
        rank = self.rank_of(op, actual) if op in _WITH_DIMS else None
        either = word.commutes if word.commutes and word.commutes[1] < len(node.args) else ()
        numbers = bool(either) and all(isinstance(node.args[e], Fixed) for e in either)
        if numbers and not self.either_way(node.args, actual, word, rank):
            return None
        goals: list[_Goal] = []
        places: list[int] = []
        for at, operand in enumerate(node.args):
            if isinstance(operand, Rest):
                if not self.bind(operand.name, actual[at:]):
                    return None
                break
            if numbers and at in either:
                continue
            kind = word.parameters[at].kind
            met = None if at in either else self.met(operand, actual[at], kind, rank)
            if met is None:
                goals.append(_Goal(operand, actual[at], kind, rank))
                places.append(at)
            elif not met:
                return None
        if not either or numbers:
            return [goals]
        i, j = (places.index(e) for e in either)
        other = list(goals)
        other[i] = goals[i]._replace(actual=goals[j].actual)
        other[j] = goals[j]._replace(actual=goals[i].actual)
        return [left for way in (goals, other) if (left := self.unmet(way)) is not None]

    def either_way(
        self, operands: Sequence[Operand], actual: tuple[Any, ...], word: OpWord, rank: int | None
    ) -> bool:
        """Whether two numbers that may change places stand there: the dimensions of a transpose."""
        assert word.commutes is not None
        i, j = word.commutes
        kind = word.parameters[i].kind

        def fit(one: int, other: int) -> bool:
            first = self.met(operands[i], actual[one], kind, rank)
            return bool(first and self.met(operands[j], actual[other], kind, rank))

        return fit(i, j) or fit(j, i)

    def met(self, operand: Operand, actual: Any, kind: Kind, rank: int | None) -> bool | None:
        """Whether a name or a number fits; None for an operand that has to be followed."""
        if isinstance(operand, ValueRef):
            return self.bind(operand.name, actual)
        if isinstance(operand, Fixed):
            return self.is_constant(operand, actual, kind, rank)
        return None

    def unmet(self, goals: list[_Goal]) -> list[_Goal] | None:
        """The goals without those of numbers that are met; None where one is not."""
        left: list[_Goal] = []
        for goal in goals:
            if not isinstance(goal.operand, Fixed):
                left.append(goal)
            elif not self.is_constant(goal.operand, goal.actual, goal.kind, goal.rank):
                return None
        return left

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
            return self.is_constant(operand, actual, goal.kind, goal.rank)
        if isinstance(operand, Without):
            self.without.append((operand, actual))
            return True
        return isinstance(operand, Anything)

    def is_constant(self, operand: Fixed, actual: Any, kind: Kind, rank: int | None) -> bool:
        if operand.value is actual:
            return True
        return not self.view.is_value(actual) and same_constant(operand.value, actual, kind, rank)

    def items(self, operand: Items, goal: _Goal) -> list[_Goal] | None:
        actual = goal.actual
        if not isinstance(actual, tuple):
            return None
        given: tuple[Any, ...] = actual
        wanted = operand.items
        kind = _OF_ITEMS.get(goal.kind, "value")
        if not any(isinstance(o, Rest) for o in wanted):
            if len(given) != len(wanted):
                return None
            left: list[_Goal] = []
            for item, value in zip(wanted, given, strict=True):
                met = self.met(item, value, kind, goal.rank)
                if met is None:
                    left.append(_Goal(item, value, kind, goal.rank))
                elif not met:
                    return None
            return left
        spread = next(i for i, o in enumerate(wanted) if isinstance(o, Rest))
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
            last = self.trail.pop()
            if isinstance(last, str):
                del self.names[last]
            else:
                self.taken.discard(id(self.assigned[last]))
                self.assigned[last] = None

    def finish(self) -> Iterator[Occurrence]:
        """All is assigned: what comes from outside is not made inside, and what must not be is not."""
        for name in self.pattern.inputs:
            known = self.names.get(name)
            if id(known) in self.taken:
                return
            if isinstance(known, tuple) and any(id(v) in self.taken for v in opened(known)):
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
