"""Near misses of dataflow patterns: from distances to places, changes in words and suggested edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from graftc.diagnostics import Span
from graftc.language.rules import DataflowMatch, Rule
from graftc.program.flat import Op, common_path
from graftc.rewrite.dataflow.matcher import Occurrence, Sites, opened, same
from graftc.rewrite.dataflow.pattern import (
    Fixed,
    Items,
    Node,
    NodeRef,
    Pattern,
    ValueRef,
)
from graftc.rewrite.dataflow.select import (
    Turned,
    claimed_nodes,
    rule_patterns,
    select_occurrences,
)
from graftc.rewrite.dataflow.view import ProgramView
from graftc.rewrite.whynot import words
from graftc.rewrite.whynot.align import EXTRA, MISSING, MOST, OTHER, Aligner
from graftc.rewrite.whynot.change import Change, Miss, ranked, source_line

_MOST_READ = 64
"""As many of the nearest places are worked out in words; the others are further away."""


def dataflow_misses(rule: Rule, view: ProgramView, sites: Sites | None = None) -> tuple[Miss, ...]:
    """The near misses of a dataflow rule over the whole graph, the nearest first.

    A place where half of the pattern's ops or more are there, and where the changes cost 3.5 at most. Places that
    are matched, or that share ops with a nearer one, are left out.
    """
    if not any(isinstance(m, DataflowMatch) for m in rule.matches):
        return ()
    patterns = rule_patterns(rule)
    matched, turned = select_occurrences(rule, patterns, view, sites)
    taken = {i for o in matched for i in _own(o)}
    guarded = [t for t in turned if t.leak is None]
    taken |= {i for t in guarded for i in _own(t.occurrence)}
    names = [view.op(o) if o.kind == "op" else "" for o in view.flat.ops]
    found = [m for p in patterns for m in _nearest(p, view, names, sites or {}, taken)]
    return ranked([*(_guarded(rule, t) for t in guarded), *_apart(found)])


def _own(occurrence: Occurrence) -> list[int]:
    """The ops that a match takes: those that the rewrite makes go or new, or all."""
    pattern = occurrence.pattern
    own = claimed_nodes(pattern) or range(len(pattern.nodes))
    return [occurrence.values[i].index for i in own]


def _guarded(rule: Rule, turned: Turned) -> Miss:
    """An occurrence with every op in its place, that a guard turns down."""
    values: list[Op] = list(turned.occurrence.values)
    where = rule.where.span if rule.where is not None else None
    spans = [g.span for g in rule.guards if turned.reason.startswith((g.name, f"shape({g.name})"))]
    change = Change("guard", 1.0, turned.reason, next(iter(spans), where))
    path, root = common_path(values), values[-1]
    place = f"{path}: `{root.node.name}`" if path else f"`{root.node.name}`"
    return Miss(place, (change,), source_line(root))


@dataclass
class _Laid:
    """A pattern laid onto ops: what each node and name stands for, and what had to change.

    `passed`: ops that were passed over; `over`: those of them by the node that they stand above.
    """

    nodes: dict[int, Op] = field(default_factory=dict[int, Op])
    names: dict[str, object] = field(default_factory=dict[str, object])
    passed: set[int] = field(default_factory=set[int])
    over: dict[int, set[int]] = field(default_factory=dict[int, "set[int]"])
    changes: list[Change] = field(default_factory=list[Change])
    equal: int = 0

    @property
    def cost(self) -> float:
        return sum(c.cost for c in self.changes)

    @property
    def ops(self) -> frozenset[int]:
        return frozenset(o.index for o in self.nodes.values())


def _nearest(
    pattern: Pattern, view: ProgramView, names: list[str], sites: Sites, taken: set[int]
) -> list[tuple[_Laid, Miss]]:
    roots = [n for n in pattern.nodes if not pattern.users[n.index]]
    if not roots:
        return []
    first = roots[-1]
    aligner = Aligner(pattern, view, names, sites)
    candidates: list[tuple[float, int]] = []
    for op in view.flat.ops:
        if op.kind == "op" and op.index not in taken:
            step = aligner.step(first.index, op)
            if step.cost <= MOST and step.way != "extra":
                candidates.append((step.cost, op.index))
    found: list[tuple[_Laid, Miss]] = []
    for _, index in sorted(candidates)[:_MOST_READ]:
        laid = _Laid()
        _lay(aligner, first, view.flat.ops[index], laid)
        for root in roots[:-1]:
            _lay_other(aligner, root, laid)
        laid.changes += _leaks(pattern, laid, view)
        enough = 2 * laid.equal >= len(pattern.nodes)
        if laid.changes and laid.cost <= MOST and enough and not laid.ops & taken:
            found.append((laid, _miss(laid, view.flat.ops[index])))
    return found


def _apart(found: list[tuple[_Laid, Miss]]) -> Iterator[Miss]:
    """Of places that share ops, the nearest."""
    seen: set[int] = set()
    for laid, miss in sorted(found, key=lambda f: (round(f[0].cost, 3), -f[0].equal)):
        if not laid.ops & seen:
            seen |= laid.ops
            yield miss


def _miss(laid: _Laid, root: Op) -> Miss:
    path = common_path(list(laid.nodes.values()))
    place = f"{path}: `{root.node.name}`" if path else f"`{root.node.name}`"
    line = next((c.source for c in laid.changes if c.source), None)
    return Miss(place, tuple(laid.changes), line or source_line(root))


# -- laying a node ---------------------------------------------------------------------------------


def _lay(aligner: Aligner, node: Node, value: Op, laid: _Laid) -> None:
    """Follows the cheapest way from a node and an op down, and writes down each change."""
    step = aligner.step(node.index, value)
    if step.way == "extra" and step.via is not None:
        laid.passed.add(value.index)
        laid.over.setdefault(node.index, set()).add(value.index)
        laid.changes.append(words.extra(node, value, aligner.names[value.index], EXTRA))
        _lay(aligner, node, aligner.view.flat.ops[step.child], laid)
        return
    if step.way == "missing":
        cost = aligner.without(node.index, step.child)
        laid.changes.append(words.missing(node, value, cost))
        _lay(aligner, aligner.pattern.nodes[step.child], value, laid)
        return
    known = laid.nodes.get(node.index)
    if known is not None:
        if known is not value:
            laid.changes.append(words.two_values(_called(node), node.span, known, value))
        return
    laid.nodes[node.index] = value
    name = aligner.names[value.index]
    if step.way == "other":
        laid.changes.append(words.other(node, value, name, OTHER))
    else:
        laid.equal += 1
    if step.swapped:
        laid.changes.append(words.order(node, value, name))
    for operand, actual, at in step.pairs:
        _operand(aligner, node, operand, actual, at, value, laid, step.way == "other")


def _operand(
    aligner: Aligner,
    node: Node,
    operand: object,
    actual: object,
    at: int,
    value: Op,
    laid: _Laid,
    other_op: bool,
) -> None:
    name = aligner.names[value.index]
    if isinstance(operand, NodeRef):
        child = aligner.pattern.nodes[operand.index]
        if not isinstance(actual, Op):
            laid.changes.append(words.unlike(child, operand.span, value, actual))
            return
        known = laid.nodes.get(operand.index)
        if known is not None:
            if known is not actual and actual.index not in laid.over.get(operand.index, ()):
                said = words.two_values(_called(child), operand.span, known, actual, value)
                laid.changes.append(said)
            return
        below = aligner.step(operand.index, actual).cost
        bare = aligner.bare(operand.index, actual)
        other = aligner.unlike(operand.index)
        if bare < below and bare <= other:
            laid.changes.append(words.missing(child, value, bare))
            _names_of(child, actual, laid, value)
        elif other < below:
            laid.changes.append(words.unlike(child, operand.span, value, actual))
        else:
            _lay(aligner, child, actual, laid)
    elif isinstance(operand, ValueRef):
        _bind(operand.name, operand.span, actual, laid, value)
    elif isinstance(operand, Fixed):
        cost = aligner.operand(operand, actual, name, at, value, other_op)
        if cost:
            kind = aligner.kind(name, at)
            laid.changes.append(words.constant(node, operand, actual, name, at, kind, value, cost))
    elif isinstance(operand, Items):
        if isinstance(actual, tuple) and len(actual) == len(operand.items):
            for inner, one in zip(operand.items, actual, strict=True):
                _operand(aligner, node, inner, one, at, value, laid, other_op)
        else:
            cost = aligner.operand(operand, actual, name, at, value, other_op)
            laid.changes.append(words.listed(node, operand.span, actual, name, value, cost))


def _names_of(node: Node, actual: Op, laid: _Laid, at: Op) -> None:
    """A node that is missing stands aside: its one value from outside is what stands there."""
    outside = [o for o in node.operands if isinstance(o, ValueRef)]
    if len(outside) == 1:
        _bind(outside[0].name, outside[0].span, actual, laid, at)


def _bind(name: str, span: Span, actual: object, laid: _Laid, at: Op) -> None:
    if name not in laid.names:
        laid.names[name] = actual
    elif not same(laid.names[name], actual):
        laid.changes.append(words.two_values(name, span, laid.names[name], actual, at))


def _called(node: Node) -> str:
    return node.names[0] if node.names else node.span.text


def _lay_other(aligner: Aligner, root: Node, laid: _Laid) -> None:
    """Another output: the cheapest value above what is laid, sharing what the pattern shares."""
    best: tuple[float, _Laid] | None = None
    for value in _above(laid, len(aligner.pattern.nodes)):
        step = aligner.step(root.index, value)
        if step.cost > MOST or step.way == "extra":
            continue
        tried = _Laid(
            dict(laid.nodes),
            dict(laid.names),
            set(laid.passed),
            dict(laid.over),
            list(laid.changes),
            laid.equal,
        )
        _lay(aligner, root, value, tried)
        if best is None or tried.cost < best[0]:
            best = (tried.cost, tried)
    if best is None or best[0] > laid.cost + MISSING:
        laid.changes.append(words.missing(root, next(iter(laid.nodes.values())), MISSING))
        return
    other = best[1]
    laid.nodes, laid.names = other.nodes, other.names
    laid.passed, laid.over = other.passed, other.over
    laid.changes, laid.equal = other.changes, other.equal


def _above(laid: _Laid, depth: int) -> Iterable[Op]:
    """The ops that use what is laid, and their users, up to the pattern's size."""
    values = [o for v in laid.names.values() for o in opened(v) if isinstance(o, Op)]
    level: list[Op] = [*laid.nodes.values(), *values]
    seen: dict[int, Op] = {}
    for _ in range(depth):
        level = [u for o in level for u in o.users if u.kind == "op" and u.index not in seen]
        seen.update({o.index: o for o in level})
        if len(seen) > _MOST_ABOVE or not level:
            break
    inside = laid.ops
    return [seen[i] for i in sorted(seen) if i not in inside]


_MOST_ABOVE = 400


def _leaks(pattern: Pattern, laid: _Laid, view: ProgramView) -> list[Change]:
    """Inner values that something outside uses: they cannot go."""
    inside: Mapping[int, Op] = {o.index: o for o in laid.nodes.values()}
    found: list[Change] = []
    for index in sorted(pattern.inner):
        value = laid.nodes.get(index)
        if value is None:
            continue
        node = pattern.nodes[index]
        users = [u for u in value.users if u.index not in inside and u.index not in laid.passed]
        if users:
            found.append(words.outside(node, value, users[0]))
        elif value.index in view.returned:
            found.append(words.outside(node, value, None))
    return found
