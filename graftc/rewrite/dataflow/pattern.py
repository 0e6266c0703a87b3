"""The lowered form of a dataflow pattern: a small graph of ops, one for each way to take its choices.

`maybe` and `(x | y)` are expanded, so a `Pattern` has no choices but the names of an op (`(matmul | bmm)`).
Every node and operand keeps the span that it was written at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Union

from graftc.diagnostics import Span, fail
from graftc.language.dataflow_ops import OPS
from graftc.language.rules import (
    Binds,
    Constant,
    DataflowMatch,
    EitherTerm,
    ListTerm,
    MaybeTerm,
    NotTerm,
    OpTerm,
    Ref,
    Rewrite,
    SiteTerm,
    SpreadTerm,
    Term,
)
from graftc.language.terms import inner_terms, read_names
from graftc.operators.spec import Value

GETITEM = "getitem"
SITE = "site"
MOST_CHOICES = 64


@dataclass(frozen=True)
class NodeRef:
    """The result of another node of the pattern."""

    index: int
    span: Span


@dataclass(frozen=True)
class ValueRef:
    """A named value from outside the pattern: a tensor, a number, a list, whatever stands there."""

    name: str
    span: Span


@dataclass(frozen=True)
class Fixed:
    """A constant. `span` None: not written, the parameter's default."""

    value: Value
    span: Span | None


@dataclass(frozen=True)
class Anything:
    """What the pattern does not say and may be anything."""


@dataclass(frozen=True)
class Items:
    """A list of operands; a `Rest` among them takes any number."""

    items: tuple[Operand, ...]
    span: Span


@dataclass(frozen=True)
class Rest:
    """`args…`: all that is left."""

    name: str
    span: Span


@dataclass(frozen=True)
class Without:
    """`not f(x)`: whatever is not the last node of this pattern."""

    pattern: Pattern
    span: Span


Operand = Union[NodeRef, ValueRef, Fixed, Anything, Items, Rest, Without]


@dataclass(frozen=True)
class Node:
    """One op of a pattern.

    `ops`: names it may have (of `OPS`, `getitem`, or `aten.…`); a bound site's call has the op `site` and `site`
    is its name, with `args` None where its inputs may be anything. `args`: one for each parameter of the op's
    signature. `names`: what the pattern calls its result.
    """

    index: int
    ops: tuple[str, ...]
    args: tuple[Operand, ...] | None
    span: Span
    op_span: Span
    names: tuple[str, ...] = ()
    site: str = ""
    named: tuple[tuple[str, Operand], ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (*(self.args or ()), *(o for _, o in self.named))


@dataclass(frozen=True)
class Pattern:
    """A pattern without choices. Nodes stand in the order of their dependence.

    `results`: what each name of a target denotes. `written`: nodes that the rewrite gives new values; `read`: nodes
    whose values it reads, which therefore stay. All other nodes with a user in the pattern are `inner`.
    """

    nodes: tuple[Node, ...]
    results: Mapping[str, Operand] = field(compare=False)
    span: Span
    written: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the nodes that use it."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for index in dict.fromkeys(
                r.index for r in refs(node.operands) if isinstance(r, NodeRef)
            ):
                found[index].append(node.index)
        return tuple(tuple(f) for f in found)

    @cached_property
    def inner(self) -> frozenset[int]:
        """Nodes whose value must not be used outside the match."""
        free = self.written | self.read
        return frozenset(n.index for n in self.nodes if n.index not in free and self.users[n.index])

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of values from outside, in the order of the text."""
        found: dict[str, None] = {}
        for node in self.nodes:
            for operand in refs(node.operands):
                if isinstance(operand, (ValueRef, Rest)):
                    found.setdefault(operand.name)
        return tuple(found)


def refs(operands: Sequence[Operand]) -> Iterator[Operand]:
    """Operands with lists opened; what stands in a `not` is left out."""
    for operand in operands:
        if isinstance(operand, Items):
            yield from refs(operand.items)
        else:
            yield operand


def patterns_of(match: DataflowMatch, rewrite: Rewrite | None = None) -> tuple[Pattern, ...]:
    """Every way to take the choices of a pattern, in the order of the text.

    Raises GraftError where one of them is not connected, or where there are more than 64.
    """
    choices = [c for s in match.statements for c in _choices(s.value)]
    counts = [2 if isinstance(c, MaybeTerm) else len(c.choices) for c in choices]
    total = 1
    for count in counts:
        total *= count
    if total > MOST_CHOICES:
        fail(
            "G377",
            f"this pattern can be taken in {total} ways",
            span=match.span,
            wanted=f"at most {MOST_CHOICES}",
            help="write two rules",
        )
    found: dict[Pattern, None] = {}
    for taken in product(*(range(c) for c in counts)):
        decided = {id(c): n for c, n in zip(choices, taken, strict=True)}
        pattern = _Lowering(decided).pattern(match, rewrite)
        if pattern.nodes:
            check_connected(pattern)
            found.setdefault(pattern)  # equal where choices came to the same
    return tuple(found)


def check_connected(pattern: Pattern) -> None:
    """All nodes hang together, by a node's result or a value that they share. Raises GraftError."""
    group = {n.index: n.index for n in pattern.nodes}

    def find(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    readers: dict[str, int] = {}
    for node in pattern.nodes:
        for operand in refs(node.operands):
            if isinstance(operand, NodeRef):
                group[find(operand.index)] = find(node.index)
            elif isinstance(operand, (ValueRef, Rest)):
                first = readers.setdefault(operand.name, node.index)
                group[find(first)] = find(node.index)
    roots = {find(n.index) for n in pattern.nodes}
    if len(roots) > 1:
        first, second = (
            next(n for n in pattern.nodes if find(n.index) == r) for r in sorted(roots)[:2]
        )
        fail(
            "G376",
            "this pattern falls into parts that share no value",
            span=second.span,
            wanted="a value that this part shares with the rest",
            found=f"nothing in common with `{first.span.text}`",
            help="write a rule for each part",
        )


def _choices(term: Term | None) -> Iterator[MaybeTerm | EitherTerm]:
    if isinstance(term, (MaybeTerm, EitherTerm)):
        yield term
    for inner in inner_terms(term):
        yield from _choices(inner)


@dataclass
class _Lowering:
    """One expansion: `decided` says which choice each choice point takes."""

    decided: Mapping[int, int]
    nodes: list[Node] = field(default_factory=list[Node])
    results: dict[str, Operand] = field(default_factory=dict[str, Operand])

    def pattern(self, match: DataflowMatch, rewrite: Rewrite | None) -> Pattern:
        for statement in match.statements:
            self.statement(statement)
        written, read = self._uses(rewrite)
        return Pattern(tuple(self.nodes), dict(self.results), match.span, written, read)

    def _uses(self, rewrite: Rewrite | None) -> tuple[frozenset[int], frozenset[int]]:
        """What a rewrite writes and reads; without one nothing is taken away."""
        if rewrite is None:
            return frozenset(), frozenset()

        def index(name: str) -> set[int]:
            result = self.results.get(name)
            return {result.index} if isinstance(result, NodeRef) else set()

        written = frozenset(i for name in rewrite.outputs for i in index(name))
        read: set[int] = set()
        done: set[str] = set()
        for statement in rewrite.statements:
            for name in read_names(statement.value):
                if name not in done:
                    read |= index(name)
            done |= {t.name for t in statement.targets}
        return written, frozenset(read)

    def statement(self, statement: Binds) -> None:
        value = self.term(statement.value)
        if len(statement.targets) == 1:
            self._name(statement.targets[0], value)
            return
        for position, target in enumerate(statement.targets):
            if target.name.startswith("_"):
                continue
            item = Node(
                len(self.nodes),
                (GETITEM,),
                (value, Fixed(position, None)),
                target.span,
                target.span,
            )
            self.nodes.append(item)
            self._name(target, NodeRef(item.index, target.span))

    def _name(self, target: Ref, value: Operand) -> None:
        self.results[target.name] = value
        if isinstance(value, NodeRef):
            node = self.nodes[value.index]
            self.nodes[value.index] = replace(node, names=(*node.names, target.name))

    def term(self, term: Term) -> Operand:
        match term:
            case Ref(name=name):
                known = self.results.get(name)
                if isinstance(known, NodeRef):
                    return NodeRef(known.index, term.span)
                return known if known is not None else ValueRef(name, term.span)
            case Constant():
                return Fixed(term.value, term.span)
            case ListTerm():
                return Items(tuple(self.term(t) for t in term.items), term.span)
            case SpreadTerm():
                return Rest(term.name, term.span)
            case MaybeTerm():
                inner = term.value
                if self.decided[id(term)] == 0:
                    return self.term(inner)
                assert isinstance(inner, OpTerm)
                first = next(a for a in inner.args if a is not None)
                return self.term(first)
            case EitherTerm():
                return self.term(term.choices[self.decided[id(term)]])
            case NotTerm():
                apart = _Lowering(self.decided, [], dict(self.outside()))
                apart.term(term.value)
                return Without(Pattern(tuple(apart.nodes), {}, term.span), term.span)
            case SiteTerm():
                return self._site(term)
            case OpTerm():
                return self._op(term)

    def outside(self) -> Mapping[str, Operand]:
        """What names mean inside a `not`: values of the pattern around it, by name."""
        return {n: r for n, r in self.results.items() if not isinstance(r, NodeRef)}

    def _site(self, term: SiteTerm) -> NodeRef:
        args = None if term.args is None else tuple(self.term(a) for a in term.args)
        for at, node in enumerate(self.nodes):
            if node.site == term.binding:  # one call, whose inputs may be said only once
                self.nodes[at] = replace(node, args=node.args if args is None else args)
                return NodeRef(node.index, term.span)
        node = Node(len(self.nodes), (SITE,), args, term.span, term.span, site=term.binding)
        self.nodes.append(node)
        return NodeRef(node.index, term.span)

    def _op(self, term: OpTerm) -> NodeRef:
        word = OPS.get(term.ops[0])
        args: list[Operand] = []
        for at, given in enumerate(term.args):
            if given is not None:
                args.append(self.term(given))
            elif word is not None:
                default = word.parameters[at].default
                args.append(Anything() if default == "any" else Fixed(default, None))
        named = tuple((n, self.term(t)) for n, t in term.named)
        node = Node(len(self.nodes), term.ops, tuple(args), term.span, term.op_span, named=named)
        self.nodes.append(node)
        return NodeRef(node.index, term.span)
