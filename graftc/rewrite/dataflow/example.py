"""A pattern as a graph: the least graph that is what the pattern says, on tensors that its ops take.

Every name from outside becomes an input, a parameter or a number, of the first rank, dtype or value with which
the ops run. They run on the meta device, so nothing is computed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.diagnostics import Diagnostic, GraftError, Span
from graftc.language.dataflow_ops import OPS, Kind
from graftc.language.rules import (
    Constant,
    KindGuard,
    ListTerm,
    OpTerm,
    Ref,
    ShapeGuard,
    SiteTerm,
    SpreadTerm,
    Term,
    ValueGuard,
)
from graftc.rewrite.dataflow.lower import Lowering
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
)

SIZE = 12
"""Every dimension that nothing says: it divides by 2, 3, 4 and 6, and equal sizes fit together."""
_PARTS = (3, 4, 5, 7)
"""Sizes of the names of a product, `(h d)`."""
_RANKS = (3, 4, 2, 1, 5, 0)
_MOST_TRIED = 1_500
_USUAL: Mapping[str, tuple[int, ...]] = {
    "linear": (3, 2, 1), "addmm": (1, 2, 2), "mm": (2, 2), "bmm": (3, 3), "baddbmm": (3, 3, 3),
    "conv1d": (3, 3, 1), "conv2d": (4, 4, 1), "conv3d": (5, 5, 1), "embedding": (2, 2),
    "layer_norm": (3, 0, 1, 1), "rms_norm": (3, 0, 1), "group_norm": (4, 0, 1, 1), "batch_norm": (4, 1, 1, 1, 1),
}  # fmt: skip
"""The ranks that an op's arguments most often have; they are tried first."""
SPAN = "graftc_span"
"""A node's metadata: the place in the rule that made it."""


@dataclass(frozen=True, eq=False)
class Example:
    """A graph that is what a pattern says. `sites`: for each binding the node that stands for its call."""

    root: fx.GraphModule
    sites: Mapping[str, fx.Node]


@dataclass
class _Search:
    """`values`: what names and nodes stand for so far; a node's is called `%INDEX`."""

    pattern: Pattern
    guards: tuple[ValueGuard, ...]
    dtype: torch.dtype
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    refused: Diagnostic | None = None
    reached: int = -1
    tried: int = 0

    def run(self) -> bool:
        """Whether the ops run: `values` holds with what. `refused`: what the op that was reached last said."""
        return self._from(0)

    def _from(self, index: int) -> bool:
        if index == len(self.pattern.nodes):
            return True
        node = self.pattern.nodes[index]
        term = term_of(node)
        unknown = [n for n in _names(node) if n[0] not in self.values]
        choices = [self._candidates(name, kind, node) for name, kind in unknown]
        for taken in _nearest_first(choices):
            self.tried += 1
            if self.tried > _MOST_TRIED:
                return False
            for (name, _), value in zip(unknown, taken, strict=True):
                self.values[name] = value
            for result in self._results(node, term):
                self.values[f"%{index}"] = result
                if self._from(index + 1):
                    return True
            for name, _ in unknown:
                del self.values[name]
            self.values.pop(f"%{index}", None)
        return False

    def _results(self, node: Node, term: Term) -> Iterator[Any]:
        if node.site:
            first = node.args[0] if node.args else None
            given = self.values.get(_key(first)) if first is not None else None
            yield from (given,) if isinstance(given, Tensor) else map(self._tensor, _RANKS[:4])
            return
        lowering = Lowering(_call, self.values, _is_tensor, _no_site)
        try:
            yield item_of(self.values, node) if node.ops == (GETITEM,) else lowering.term(term)
        except GraftError as error:
            self._refuses(node, error.diagnostics[0])
        except Exception as error:  # what a meta kernel raises; tried on other tensors
            message = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._refuses(
                node, Diagnostic("G445", f"`{node.span.text}`: {message}", span=node.span)
            )

    def _refuses(self, node: Node, why: Diagnostic) -> None:
        if node.index > self.reached:
            self.reached, self.refused = node.index, why

    def _tensor(self, rank: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._shaped((SIZE,) * rank, dtype)

    def _shaped(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def _candidates(self, name: str, kind: Kind, node: Node) -> Sequence[Any]:
        said = [g.kind for g in self.guards if isinstance(g, KindGuard) and g.name == name and not g.negated]  # fmt: skip
        shapes = [g for g in self.guards if isinstance(g, ShapeGuard) and g.name == name]
        rest = next((a for a, o in enumerate(node.args or ()) if isinstance(o, Rest) and o.name == name), None)  # fmt: skip
        if rest is not None:
            return self._rests(node, rest)
        if any(isinstance(o, Items) and any(isinstance(i, Rest) and i.name == name for i in o.items) for o in node.operands):  # fmt: skip
            if kind != "values":
                return ((SIZE,), (), (1,), (SIZE, SIZE))
            return [(t, t) for t in self._tensors()]
        if "none" in said:
            return (None,)
        if "number" in said or kind not in ("value", "values"):
            return self._numbers(kind, node, name)
        if shapes:
            return [self._shaped(s) for s in self._shapes(shapes[0])]
        tensors = self._tensors()
        place = next((a for a, o in enumerate(node.args or ()) if _key(o) == name), 0)
        usual = _USUAL.get(node.ops[0], ())[place : place + 1]
        tensors.sort(key=lambda t: (t.dtype != self.dtype, t.ndim not in usual))
        return tensors if said or kind == "values" else (*tensors, 0.3171, None)

    def _tensors(self) -> list[Tensor]:
        """Tensors to try: of one size, then of the sizes that tensors have by now, then of other dtypes."""
        known = {s for v in self.values.values() for t in _tensors_of(v) for s in t.shape}
        shapes = [(SIZE,) * r for r in _RANKS]
        for size in sorted(known - {SIZE}):
            shapes += [(SIZE, size), (size, SIZE), (size,), (size, size), (SIZE, SIZE, size), (SIZE,) * 3 + (size,)]  # fmt: skip
        others = [self._tensor(r, d) for d in (torch.int64, torch.bool) for r in _RANKS]
        return [*map(self._shaped, shapes), *others]

    def _rests(self, node: Node, at: int) -> Sequence[Any]:
        """What `args…` may stand for: what the op needs, of any ranks, and its other arguments at their defaults."""
        word = OPS.get(node.ops[0])
        if word is None:
            return ((),)
        left = word.parameters[at:]
        ways = [
            [self._tensor(r) for r in _RANKS]
            if p.required and p.kind == "value"
            else self._numbers(p.kind, node, "")
            if p.required
            else [_anything(p.kind) if p.default == "any" else p.default]
            for p in left
        ]
        return list(itertools.islice(itertools.product(*ways), 200))

    def _numbers(self, kind: Kind, node: Node, name: str) -> Sequence[Any]:
        """Values of a captured number, word or list; distinct ones, and none at which an op is left out."""
        taken = sum(isinstance(v, (int, float)) for v in self.values.values())
        plain = 0.3171 + 0.0617 * taken
        default = _default(node, name)
        if kind == "dim":
            return sorted((-1, -2, 0, 1, 2), key=[*self.values.values()].count)
        if kind == "dims":
            return ((-1,), (0, 1), (0, 2, 1), (0, 2, 1, 3), -1)
        if kind == "flag":
            return (True, False)
        if kind == "word":
            return (*default, "float64", "none", "constant", None)
        if kind in ("list", "sizes"):
            in_list = any(isinstance(o, Items) and any(_key(i) == name for i in o.items) for o in node.operands)  # fmt: skip
            if in_list or kind == "sizes":
                return (*default, SIZE, 1, -1, 2, 0)
            return ((SIZE,), *((SIZE,) * n for n in (2, 3, 4)), (SIZE, -1), (1,) * 3, (1,) * 4, 3, 1)  # fmt: skip
        return (*default, plain, 2, 1, -1)

    def _shapes(self, guard: ShapeGuard) -> Iterator[tuple[int, ...]]:
        sizes = self._sizes()
        known: list[tuple[int, ...]] = []
        for dim in guard.dims:
            if dim.rest:
                known.append(())
            elif dim.number is not None:
                known.append((dim.number,))
            else:
                product = 1
                for name in dim.names:
                    product *= sizes[name]
                known.append((product,))
        rests = (2, 1, 3, 0) if any(d.rest for d in guard.dims) else (0,)
        for rest in rests:
            yield tuple(s for k in known for s in (k or (SIZE,) * rest))

    def _sizes(self) -> dict[str, int]:
        dims = [d for g in self.guards if isinstance(g, ShapeGuard) for d in g.dims]
        products = dict.fromkeys(n for d in dims if len(d.names) > 1 for n in d.names)
        sizes = {n: SIZE for d in dims for n in d.names}
        return sizes | dict(zip(products, itertools.cycle(_PARTS), strict=False))


def example_of(
    pattern: Pattern, guards: tuple[ValueGuard, ...], dtype: torch.dtype
) -> Example | Diagnostic:
    """The graph of a pattern, or what the op said that does not run on any tensors that were tried.

    >>> from graftc.language.check import check
    >>> from graftc.rewrite.dataflow.select import rule_patterns
    >>> (rule,) = check("rule r { match { y = x * sigmoid(x) }\\nrewrite { y = silu(x) }\\n}").rules
    >>> example = example_of(rule_patterns(rule)[0], rule.guards, torch.float32)
    >>> [str(n.target) for n in example.root.graph.nodes][1:3]
    ['aten.sigmoid.default', 'aten.mul.Tensor']
    """
    search = _Search(pattern, guards, dtype)
    if not search.run():
        assert search.refused is not None
        return search.refused
    return _graph(pattern, guards, search.values)


def _graph(pattern: Pattern, guards: tuple[ValueGuard, ...], found: Mapping[str, Any]) -> Example:
    root, graph = nn.Module(), fx.Graph()
    parameters = {g.name for g in guards if isinstance(g, KindGuard) and g.kind == "parameter"}
    names: dict[str, Any] = {}
    order = [n for node in pattern.nodes for n, _ in _names(node)]
    tensors = [n for n in dict.fromkeys(order) if _tensors_of(found[n])]
    for name in dict.fromkeys(order):
        if name not in tensors:
            names[name] = found[name]
        elif name not in parameters:
            names[name] = _placeholders(graph, name, found[name])
    for name in tensors:
        if name in parameters:
            plain = _plain(name)
            root.register_parameter(plain, nn.Parameter(found[name], requires_grad=False))
            names[name] = graph.get_attr(plain)
            names[name].meta["val"] = found[name]

    def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], span: Span) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = _call(target, values, named, span)
        node.meta[SPAN] = span
        return node

    sites: dict[str, fx.Node] = {}
    for node in pattern.nodes:
        key = f"%{node.index}"
        if node.site:
            given = tuple(names[_key(a)] for a in node.args or ())
            call = graph.call_function(_site, given)
            call.meta["val"], call.meta[SPAN] = found[key], node.span
            names[key] = sites[node.site] = call
        elif node.ops == (GETITEM,):
            source = names[_key(node.args[0])] if node.args else None
            position = node.args[1].value if node.args and isinstance(node.args[1], Fixed) else 0
            names[key] = (
                emit(operator.getitem, (source, position), {}, node.span)
                if isinstance(source, fx.Node)
                else found[key]
            )
        else:
            lowering = Lowering(emit, names, lambda v: isinstance(v, fx.Node), _no_site)
            names[key] = lowering.term(term_of(node))
    returned = [names[f"%{n.index}"] for n in pattern.nodes if n.index not in pattern.inner]
    graph.output(tuple(v for v in returned if isinstance(v, fx.Node)))
    return Example(fx.GraphModule(root, graph), sites)


def term_of(node: Node) -> OpTerm | SiteTerm:
    """A node of a pattern as a term, its operands by name (`%INDEX` for another node's result)."""
    if node.site:
        return SiteTerm(node.site, None, node.span)
    word = OPS.get(node.ops[0])
    args = tuple(
        Constant(_anything(word.parameters[at].kind), node.span)
        if isinstance(o, Anything) and word is not None
        else _term(o, node.span)
        for at, o in enumerate(node.args or ())
    )
    named = tuple((n, t) for n, o in node.named if (t := _term(o, node.span)) is not None)
    return OpTerm(node.ops[:1], args, node.span, node.op_span, named)


def _term(operand: Operand, span: Span) -> Term | None:
    match operand:
        case Fixed(span=None) | Anything():
            return None
        case Fixed(value=value):
            return Constant(value, span)
        case Items(items=items):
            return ListTerm(tuple(t for i in items if (t := _term(i, span)) is not None), span)
        case Rest(name=name):
            return SpreadTerm(name, span)
        case NodeRef() | ValueRef() | Without():
            return Ref(_key(operand), span)


def _anything(kind: Kind) -> float | bool:
    """What stands where a pattern says nothing, such as a dropout's probability: nothing that is off."""
    return 0.5 if kind == "number" else True


def _default(node: Node, name: str) -> tuple[Any, ...]:
    """The default of the parameter that a name is for, if it has one."""
    word = OPS.get(node.ops[0])
    place = next((a for a, o in enumerate(node.args or ()) if _key(o) == name), None)
    if word is None or place is None or place >= len(word.parameters):
        return ()
    default = word.parameters[place].default
    return () if default is None else (_anything(word.parameters[place].kind),) if default == "any" else (default,)  # fmt: skip


def _nearest_first(choices: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """All ways to take one of each, those that take early ones first."""

    def taken(left: int, at: int) -> Iterator[tuple[Any, ...]]:
        if at == len(choices):
            yield from [()] if left == 0 else []
            return
        for index, choice in enumerate(choices[at][: left + 1]):
            for rest in taken(left - index, at + 1):
                yield (choice, *rest)

    for total in range(sum(len(c) - 1 for c in choices) + 1):
        yield from taken(total, 0)


def _key(operand: Operand | None) -> str:
    match operand:
        case NodeRef(index=index):
            return f"%{index}"
        case ValueRef(name=name) | Rest(name=name):
            return name
        case Without(span=span):
            return f"not {span.start}"
        case _:
            return ""


def _names(node: Node) -> list[tuple[str, Kind]]:
    """The values from outside that a node reads, with the kind of the parameter that each is for."""
    word = OPS.get(node.ops[0])
    found: dict[str, Kind] = {}

    def read(operand: Operand, kind: Kind) -> None:
        if isinstance(operand, Items):
            for item in operand.items:
                read(item, kind)
        elif isinstance(operand, (ValueRef, Without)):
            found.setdefault(_key(operand), kind)
        elif isinstance(operand, Rest):
            found.setdefault(operand.name, kind)

    for at, operand in enumerate(node.args or ()):
        known = word is not None and at < len(word.parameters)
        read(operand, word.parameters[at].kind if word is not None and known else "value")
    for _, operand in node.named:
        read(operand, "value")
    return list(found.items())


def item_of(values: Mapping[str, Any], node: Node) -> Any:
    """A part of an op's list of results."""
    source, position = node.args or (None, None)
    assert isinstance(position, Fixed)
    assert isinstance(position.value, int)
    return values[_key(source)][position.value]


def _placeholders(graph: fx.Graph, name: str, value: Any) -> Any:
    """An input for each tensor of a value: of a list of tensors (`args…`) one each."""
    if isinstance(value, Tensor):
        made = graph.placeholder(_plain(name))
        made.meta["val"] = value
        return made
    if isinstance(value, tuple):
        items: tuple[Any, ...] = value
        return tuple(_placeholders(graph, f"{name}_{i}", v) for i, v in enumerate(items))
    return value


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        items: Sequence[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [t for v in items for t in _tensors_of(v)]
    return []


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], span: Span) -> Any:
    del span
    with torch.no_grad():
        return target(*args, **kwargs)


def _site(*inputs: Any) -> Any:
    """Stands for the call of a bound site."""
    raise AssertionError(inputs)


def _no_site(term: SiteTerm, args: Any) -> Any:
    raise AssertionError(term.binding)  # sites are nodes of a pattern, never inside an op's term
