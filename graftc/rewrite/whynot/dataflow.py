"""Near misses of dataflow patterns: from distances to places, changes in words and suggested edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from graftc.diagnostics import Span
from graftc.language.rules import DataflowMatch, Rewrite, Rule
from graftc.program.flat import Op, common_path
from graftc.rewrite.dataflow.occurrence import Occurrence, Sites
from graftc.rewrite.dataflow.pattern import (
    Fixed,
    Items,
    Node,
    NodeRef,
    Pattern,
    ValueRef,
)
from graftc.rewrite.dataflow.same import opened, same
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
from graftc.rewrite.whynot.guard_edits import without_guard
from graftc.rewrite.whynot.mend import Edits, Mender

_Later = Callable[[Mender], Edits]

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
    rewrite = rule.edit.span if isinstance(rule.edit, Rewrite) else None
    found = [m for p in patterns for m in _nearest(p, view, names, sites or {}, taken, rewrite)]
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
    span = next(iter(spans), where)
    change = Change("guard", 1.0, turned.reason, span).edited(without_guard(span))
    path, root = common_path(values), values[-1]
    place = f"{path}: `{root.node.name}`" if path else f"`{root.node.name}`"
    return Miss(place, (change,), source_line(root))


@dataclass
class _Laid:
    """A pattern laid onto ops: what each node and name stands for, and what had to change.

    `passed`: ops that were passed over; `over`: those of them by the node that they stand above. `read`: where each
    node is read, and what stands there. `later`: for each change, how to make its edit once all is laid.
    """

    nodes: dict[int, Op] = field(default_factory=dict[int, Op])
    names: dict[str, object] = field(default_factory=dict[str, object])
    passed: set[int] = field(default_factory=set[int])
    over: dict[int, set[int]] = field(default_factory=dict[int, "set[int]"])
    changes: list[Change] = field(default_factory=list[Change])
    later: list[_Later] = field(default_factory=list[_Later])
    read: dict[int, list[tuple[Span, Op]]] = field(
        default_factory=dict[int, "list[tuple[Span, Op]]"]
    )
    equal: int = 0

    def add(self, change: Change, later: _Later) -> None:
        self.changes.append(change)
        self.later.append(later)

    def copy(self) -> _Laid:
        return _Laid(
            dict(self.nodes), dict(self.names), set(self.passed),
            {k: set(v) for k, v in self.over.items()}, list(self.changes), list(self.later),
            {k: list(v) for k, v in self.read.items()}, self.equal,
        )  # fmt: skip

    def take(self, other: _Laid) -> None:
        """Goes on from where another stands."""
        self.__dict__.update(other.__dict__)

    def mended(self, mender: Mender) -> None:
        """Gives each change its edit."""
        self.changes = [
            c.edited(later(mender)) for c, later in zip(self.changes, self.later, strict=True)
        ]

    @property
    def cost(self) -> float:
        return sum(c.cost for c in self.changes)

    @property
    def ops(self) -> frozenset[int]:
        return frozenset(o.index for o in self.nodes.values())


def _nearest(
    pattern: Pattern,
    view: ProgramView,
    names: list[str],
    sites: Sites,
    taken: set[int],
    rewrite: Span | None,
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
        _leaks(pattern, laid, view)
        enough = 2 * laid.equal >= len(pattern.nodes)
        if laid.changes and laid.cost <= MOST and enough and not laid.ops & taken:
            laid.mended(Mender(pattern, view, laid.names, laid.nodes, rewrite))
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


def _lay(aligner: Aligner, node: Node, value: Op, laid: _Laid, span: Span | None = None) -> None:
    """Follows the cheapest way from a node and an op down, and writes down each change.

    `span`: where the pattern reads the node; None at a root.
    """
    step = aligner.step(node.index, value)
    if step.way == "extra" and step.via is not None:
        below = aligner.view.flat.ops[step.child]
        laid.passed.add(value.index)
        laid.over.setdefault(node.index, set()).add(value.index)
        laid.add(
            words.extra(node, value, aligner.names[value.index], EXTRA),
            lambda m: m.extra(node, value, below, _where_passed(laid, node, value, span)),
        )
        _lay(aligner, node, below, laid, span)
        return
    if step.way == "missing":
        cost = aligner.without(node.index, step.child)
        laid.add(words.missing(node, value, cost), lambda m: m.missing(node, step.child))
        _lay(aligner, aligner.pattern.nodes[step.child], value, laid, span)
        return
    known = laid.nodes.get(node.index)
    if known is not None:
        if known is not value:
            change = words.two_values(_called(node), node.span, known, value)
            laid.add(change, lambda m: m.renamed(span, value) if span else ())
        return
    laid.nodes[node.index] = value
    name = aligner.names[value.index]
    if step.way == "other":
        change = words.other(node, value, name, OTHER)
        laid.add(change, lambda m: m.other(node, value, name, step))
    else:
        laid.equal += 1
    if step.swapped:
        places = aligner.swappable(node)
        change = words.order(node, value, name)
        laid.add(change, lambda m: m.turned(node, places) if places else ())
    for operand, actual, at in step.pairs:
        _operand(aligner, node, operand, actual, at, value, laid, step.way == "other")


def _where_passed(laid: _Laid, node: Node, value: Op, span: Span | None) -> Span:
    """Where an op that the model has more is put: around what makes the node where all read it through that op."""
    readers = laid.read.get(node.index, [])
    if span is None or (len(readers) > 1 and all(at is value for _, at in readers)):
        return node.span
    return span


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
        child, span = aligner.pattern.nodes[operand.index], operand.span
        if not isinstance(actual, Op):
            change = words.unlike(child, span, value, actual)
            laid.add(change, lambda m: m.unlike(child, span, actual))
            return
        laid.read.setdefault(operand.index, []).append((span, actual))
        known = laid.nodes.get(operand.index)
        if known is not None:
            if known is not actual and actual.index not in laid.over.get(operand.index, ()):
                said = words.two_values(_called(child), span, known, actual, value)
                laid.add(said, lambda m: m.renamed(span, actual))
            return
        below = aligner.step(operand.index, actual).cost
        bare = aligner.bare(operand.index, actual)
        other = aligner.unlike(operand.index)
        if bare < below and bare <= other:
            laid.add(words.missing(child, value, bare), lambda m: m.bare(child))
            _names_of(child, actual, laid, value)
        elif other < below:
            change = words.unlike(child, span, value, actual)
            laid.add(change, lambda m: m.unlike(child, span, actual))
        else:
            _lay(aligner, child, actual, laid, span)
    elif isinstance(operand, ValueRef):
        _bind(operand.name, operand.span, actual, laid, value)
    elif isinstance(operand, Fixed):
        cost = aligner.operand(operand, actual, name, at, value, other_op)
        if cost:
            kind = aligner.kind(name, at)
            change = words.constant(node, operand, actual, name, at, kind, value, cost)
            laid.add(change, lambda m: m.constant(node, operand, actual, name, at))
    elif isinstance(operand, Items):
        if isinstance(actual, tuple) and len(actual) == len(operand.items):
            for inner, one in zip(operand.items, actual, strict=True):
                _operand(aligner, node, inner, one, at, value, laid, other_op)
        else:
            cost = aligner.operand(operand, actual, name, at, value, other_op)
            change = words.listed(node, operand.span, actual, name, value, cost)
            laid.add(change, lambda m: m.listed(operand, actual))


def _names_of(node: Node, actual: Op, laid: _Laid, at: Op) -> None:
    """A node that is missing stands aside: its one value from outside is what stands there."""
    outside = [o for o in node.operands if isinstance(o, ValueRef)]
    if len(outside) == 1:
        _bind(outside[0].name, outside[0].span, actual, laid, at)


def _bind(name: str, span: Span, actual: object, laid: _Laid, at: Op) -> None:
    if name not in laid.names:
        laid.names[name] = actual
    elif not same(laid.names[name], actual):
        change = words.two_values(name, span, laid.names[name], actual, at)
        laid.add(change, lambda m: m.renamed(span, actual))


def _called(node: Node) -> str:
    return node.names[0] if node.names else node.span.text


def _lay_other(aligner: Aligner, root: Node, laid: _Laid) -> None:
    """Another output: the cheapest value above what is laid, sharing what the pattern shares."""
    best: tuple[float, _Laid] | None = None
    for value in _above(laid, len(aligner.pattern.nodes)):
        step = aligner.step(root.index, value)
        if step.cost > MOST or step.way == "extra":
            continue
        tried = laid.copy()
        _lay(aligner, root, value, tried)
        if best is None or tried.cost < best[0]:
            best = (tried.cost, tried)
    if best is None or best[0] > laid.cost + MISSING:
        change = words.missing(root, next(iter(laid.nodes.values())), MISSING)
        laid.add(change, lambda m: ())
        return
    laid.take(best[1])


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


def _leaks(pattern: Pattern, laid: _Laid, view: ProgramView) -> None:
    """Inner values that something outside uses: they cannot go."""
    inside: Mapping[int, Op] = {o.index: o for o in laid.nodes.values()}
    for index in sorted(pattern.inner):
        value = laid.nodes.get(index)
        if value is None:
            continue
        node = pattern.nodes[index]
        users = [u for u in value.users if u.index not in inside and u.index not in laid.passed]
        if users or value.index in view.returned:
            change = words.outside(node, value, users[0] if users else None)
            laid.add(change, partial(_kept, node))


def _kept(node: Node, mender: Mender) -> Edits:
    return mender.outside(node)
