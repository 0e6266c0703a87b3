"""The cheapest way to lay a pattern onto ops that it does not match: what differs, and where.

An edit distance from a node of the pattern to an op, over the operands below both: a node is the op, or another op
stands for it, or the model has an op more (it is passed over) or one less (the pattern's node is). Each pair of
node and op is judged once, whatever leads there, so the whole graph costs the pattern's size times its ops; a pair
whose ops differ is followed only where an operand speaks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftc.language.dataflow_ops import OPS
from graftc.program.flat import Op
from graftc.rewrite.dataflow.occurrence import Sites
from graftc.rewrite.dataflow.pattern import (
    GETITEM,
    Fixed,
    Items,
    Node,
    NodeRef,
    Pattern,
    ValueRef,
    refs,
)
from graftc.rewrite.dataflow.same import same_constant
from graftc.rewrite.dataflow.view import ProgramView

MOST = 3.5
_NEVER = 99.0
CONSTANT, AXIS, GIVEN, ORDER, EXTRA, MISSING, OTHER, UNLIKE = 0.6, 0.6, 0.7, 0.8, 1.0, 1.0, 1.0, 1.4
UNLIKE_VALUE, LOST = 1.2, 0.6
_UNSUPPORTED = 0.6
"""Added where an op is missing and nothing below it shows that it was meant."""
_MOST_EXTRA = 2

_FAMILIES = (
    "add sub mul div pow maximum minimum",
    "gelu silu relu tanh sigmoid leaky_relu elu softplus erf exp softmax log_softmax",
    "matmul bmm mm linear addmm baddbmm einsum",
    "sqrt rsqrt reciprocal square abs neg log",
    "mean sum var std amax norm cumsum",
    "layer_norm rms_norm group_norm batch_norm",
    "transpose permute reshape flatten unflatten squeeze unsqueeze expand",
    "chunk split unbind",
    "cat stack",
    "conv1d conv2d conv3d",
    "masked_fill where",
)
_FAMILY: Mapping[str, int] = {name: i for i, f in enumerate(_FAMILIES) for name in f.split()}


@dataclass(frozen=True, slots=True)
class Step:
    """How a node is laid onto a value. `way`: same, other, extra (`via` is passed over) or missing.

    `pairs`: the node's operands with what stands there, in the order chosen; `swapped` where that is not the text's.
    """

    cost: float
    way: str
    pairs: tuple[tuple[Any, Any, int], ...] = ()
    swapped: bool = False
    via: Op | None = None
    child: int = -1


_NOT = Step(_NEVER, "never")


class Aligner:
    """The distances between one pattern and all ops of a view, found as they are asked for."""

    def __init__(
        self, pattern: Pattern, view: ProgramView, names: Sequence[str], sites: Sites
    ) -> None:
        self.pattern, self.view, self.names, self.sites = pattern, view, names, sites
        self.memo: list[dict[int, Step]] = [{} for _ in pattern.nodes]
        self.ops = [frozenset(n.ops) for n in pattern.nodes]
        self.children = [
            tuple(dict.fromkeys(o.index for o in n.operands if isinstance(o, NodeRef)))
            for n in pattern.nodes
        ]
        self.operands_of: dict[int, tuple[Op, ...]] = {}
        self.first = self._first()
        self.sizes: list[int] = []
        for cs in self.children:  # nodes stand in the order of their dependence
            self.sizes.append(1 + sum(self.sizes[c] for c in cs))
        self.below = [frozenset(op for c in cs for op in self.ops[c]) for cs in self.children]

    def _first(self) -> frozenset[int]:
        """Where each node is first referred to, reading down from the roots; it is judged there alone.

        Elsewhere it is free: whether it is the same value is told once the whole pattern is laid.
        """
        seen: set[int] = set()
        found: set[int] = set()
        stack = [n.index for n in self.pattern.nodes if not self.pattern.users[n.index]]
        while stack:
            for operand in refs(self.pattern.nodes[stack.pop()].operands):
                if isinstance(operand, NodeRef) and operand.index not in seen:
                    seen.add(operand.index)
                    found.add(id(operand))
                    stack.append(operand.index)
        return frozenset(found)

    def step(self, index: int, value: Op) -> Step:
        """The cheapest way to lay a node onto a value."""
        known = self.memo[index].get(value.index)
        if known is None:
            known = self.memo[index][value.index] = self._step(index, value)
        return known

    def _step(self, index: int, value: Op) -> Step:
        node = self.pattern.nodes[index]
        if node.site:
            return Step(0.0, "same") if value in self.sites.get(node.site, {}) else _NOT
        name = self.names[value.index]
        if name in self.ops[index]:
            best = self.laid(node, value, 0.0, "same")
            if best.cost == 0:
                return best
        else:
            best = self.other(node, value, name)
        missing = self.missing(index, value, name)
        if missing.cost < best.cost:
            best = missing
        extra = self.extra(index, value, 1)
        return extra if extra.cost < best.cost else best

    def operands(self, value: Op) -> tuple[Op, ...]:
        """An op's operands, looked up once."""
        known = self.operands_of.get(value.index)
        if known is None:
            known = self.operands_of[value.index] = tuple(value.operands)
        return known

    # -- the ways ----------------------------------------------------------------------------------

    def other(self, node: Node, value: Op, name: str) -> Step:
        """Another op in the node's place, where it is of a kind or an operand of it is what the pattern wants."""
        if value.kind != "op" or not name or name == GETITEM or GETITEM in node.ops:
            return _NOT
        wanted = self.below[node.index]
        speaks = any(self.names[o.index] in wanted for o in self.operands(value))
        family = _FAMILY.get(name)
        alike = family is not None and any(_FAMILY.get(o) == family for o in node.ops)
        if wanted and not speaks:
            return _NOT
        if not wanted and not alike:
            return _NOT
        return self.laid(node, value, OTHER if alike else UNLIKE, "other")

    def missing(self, index: int, value: Op, name: str) -> Step:
        """The model goes without this node: its first operand that is a node stands here."""
        for child in self.children[index]:
            if name in self.ops[child]:
                below = self.step(child, value)
                cost = below.cost + self.without(index, child)
                if below.way == "same" and cost <= MOST:
                    return Step(cost, "missing", child=child)
        if len(self.children[index]) != 1:
            return _NOT
        child = self.children[index][0]
        if self.below[child]:  # another op below a missing one, where its own operands speak for it
            below = self.other(self.pattern.nodes[child], value, name)
            if below.cost + MISSING <= MOST:
                return Step(below.cost + MISSING, "missing", child=child)
        return _NOT

    def without(self, index: int, child: int) -> float:
        """The cost of a node that is missing: what else stands below it goes too."""
        lost = sum(self.sizes[c] for c in self.children[index] if c != child)
        return MISSING + LOST * lost

    def bare(self, index: int, value: Any) -> float:
        """The cost of a node that is missing with nothing of the pattern below it: a value from outside stands there."""
        node = self.pattern.nodes[index]
        if self.children[index] or node.site or not isinstance(value, Op):
            return _NEVER
        return MISSING + _UNSUPPORTED

    def unlike(self, index: int) -> float:
        """The cost of a value that has nothing to do with the node that should stand there."""
        if self.pattern.nodes[index].site:
            return _NEVER
        return UNLIKE_VALUE + LOST * self.sizes[index]

    def extra(self, index: int, value: Op, depth: int) -> Step:
        """The model has an op more here: one of its operands is the node."""
        if value.kind != "op" or self.names[value.index] == GETITEM:
            return _NOT
        best = _NOT
        node = self.pattern.nodes[index]
        for operand in self.operands(value):
            name = self.names[operand.index]
            right = name in self.ops[index]
            below = (
                self.laid(node, operand, 0.0, "same") if right else self.other(node, operand, name)
            )
            if below is not _NOT:
                cost = below.cost + EXTRA
                if cost < best.cost and cost <= MOST:
                    best = Step(cost, "extra", via=value, child=operand.index)
            elif depth < _MOST_EXTRA and len(operand.users) == 1:
                below = self.extra(index, operand, depth + 1)
                cost = below.cost + EXTRA
                if cost < best.cost and cost <= MOST:
                    best = Step(cost, "extra", via=value, child=operand.index)
        return best

    # -- arguments ---------------------------------------------------------------------------------

    def laid(self, node: Node, value: Op, cost: float, way: str) -> Step:
        """The node laid onto the op itself, its operands in the best order."""
        actual = self.view.args(value)
        if actual is None or node.args is None:
            return Step(cost, way) if node.args is None else _NOT
        name = self.names[value.index]
        word = OPS.get(name)
        pairs = tuple((o, a, at) for at, (o, a) in enumerate(zip(node.args, actual, strict=False)))
        other = way == "other"
        best = Step(self.total(pairs, value, cost, other), way, pairs)
        if best.cost == cost or word is None:
            return best if best.cost <= MOST else _NOT
        commutes = word.commutes
        swaps = commutes or self.swappable(node)
        if swaps is not None and swaps[1] < len(pairs):
            i, j = swaps
            turned = list(pairs)
            turned[i] = (pairs[i][0], pairs[j][1], i)
            turned[j] = (pairs[j][0], pairs[i][1], j)
            start = cost if commutes else cost + ORDER
            total = self.total(tuple(turned), value, start, other)
            if total < best.cost:
                best = Step(total, way, tuple(turned), swapped=commutes is None)
        return best if best.cost <= MOST else _NOT

    def swappable(self, node: Node) -> tuple[int, int] | None:
        """The two operands of an op whose order matters, where one is a node: the order can then be told."""
        values = [i for i, o in enumerate(node.args or ()) if isinstance(o, (NodeRef, ValueRef))]
        told = any(isinstance((node.args or ())[i], NodeRef) for i in values)
        return (values[0], values[1]) if len(values) == 2 and told else None

    def total(
        self, pairs: Sequence[tuple[Any, Any, int]], value: Op, cost: float, other: bool
    ) -> float:
        name = self.names[value.index]
        for operand, actual, at in pairs:
            cost += self.operand(operand, actual, name, at, value, other)
            if cost > MOST:
                return _NEVER
        return cost

    def operand(
        self, operand: Any, actual: Any, name: str, at: int, value: Op, other: bool = False
    ) -> float:
        """What an operand costs where `actual` stands."""
        if isinstance(operand, NodeRef):
            if id(operand) not in self.first:
                return 0.0
            unlike = self.unlike(operand.index)
            if not isinstance(actual, Op):
                return unlike
            return min(
                self.step(operand.index, actual).cost, self.bare(operand.index, actual), unlike
            )
        if isinstance(operand, Fixed):
            if isinstance(actual, Op):
                return GIVEN
            kind, rank = self.kind(name, at), self.rank(name, value)
            if other and kind not in ("dim", "dims"):
                return 0.0  # a number of another op is no number of this one
            if same_constant(operand.value, actual, kind, rank):
                return 0.0
            return AXIS if kind in ("dim", "dims") else CONSTANT if operand.span else GIVEN
        if isinstance(operand, Items):
            if not isinstance(actual, tuple) or len(actual) != len(operand.items):
                return GIVEN
            return sum(
                self.operand(o, a, name, at, value, other)
                for o, a in zip(operand.items, actual, strict=True)
            )
        return 0.0

    def kind(self, name: str, at: int) -> Any:
        word = OPS.get(name)
        return (
            word.parameters[at].kind if word is not None and at < len(word.parameters) else "list"
        )

    def rank(self, name: str, value: Op) -> int | None:
        args = self.view.args(value)
        first = args[0] if args else None
        rank = self.view.rank(first) if isinstance(first, Op) else None
        return rank + 1 if rank is not None and name in ("unsqueeze", "stack") else rank
