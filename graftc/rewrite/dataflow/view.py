"""What the matcher sees of a graph: ops by name, their arguments in the language's order, their users.

`ProgramView` is that of a Program's flat view: every ATen overload under one name, with defaults filled in.
It is made once for all rules; arguments are put in order where a rule first looks at them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import fx

from graftc.language.dataflow_ops import IGNORED, OPS, AtenForm
from graftc.program.flat import Flat, Op
from graftc.program.program import ATEN
from graftc.rewrite.dataflow.pattern import GETITEM


class View(Protocol):
    """A graph to match on. A value is any object with an identity; a number, word or None is itself."""

    def named(self, op: str) -> Sequence[Any]:
        """All values that an op of this name makes."""
        ...

    def is_value(self, what: Any) -> bool: ...

    def op(self, value: Any) -> str:
        """The name of the op that makes a value, '' where it is an input, a parameter or unknown."""
        ...

    def args(self, value: Any) -> tuple[Any, ...] | None:
        """The op's arguments in the order of its signature, None where it has one that no signature says."""
        ...

    def raw(self, value: Any) -> tuple[str, tuple[Any, ...], Mapping[str, Any]]:
        """The op by ATen's name (`aten.sin.default`), with its arguments as they stand."""
        ...

    def users(self, value: Any) -> Sequence[Any]: ...

    def rank(self, value: Any) -> int | None: ...


@dataclass(frozen=True)
class _Form:
    """How the arguments of one overload become a signature's: a position and schema name, or a constant."""

    name: str
    places: tuple[tuple[int, str, Any] | None, ...]
    defaults: tuple[Any, ...]
    others: tuple[tuple[int, str, Any], ...]


@cache
def forms() -> Mapping[Any, _Form]:
    """ATen overload → its form, for every op of the language; and `operator.getitem`."""
    found: dict[Any, _Form] = {}
    for word in OPS.values():
        for form in word.forms:
            target = aten(form.target)
            if target is not None:
                found[target] = _form(word.name, form, target)
    return found


def aten(name: str) -> Any:
    """The overload called `softmax.int`, None where this torch has none."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(ATEN, packet, None), overload, None)


def _form(name: str, form: AtenForm, target: Any) -> _Form:
    schema = {a.name: (i, a) for i, a in enumerate(target._schema.arguments)}
    places: list[tuple[int, str, Any] | None] = []
    defaults: list[Any] = []
    for argument, parameter in zip(form.arguments, OPS[name].parameters, strict=True):
        if isinstance(argument, str):
            index, entry = schema[argument]
            default = entry.default_value if entry.has_default_value() else None
            places.append((index, argument, default))
        else:
            places.append(None)
        unsaid = parameter.default if argument is None else argument
        defaults.append(unsaid)
    said = {a for a in form.arguments if isinstance(a, str)} | IGNORED
    others = tuple(
        (i, n, a.default_value if a.has_default_value() else None)
        for n, (i, a) in schema.items()
        if n not in said
    )
    return _Form(name, tuple(places), tuple(defaults), others)


@dataclass(frozen=True, eq=False)
class ProgramView:
    """The view of a Program's ops."""

    flat: Flat
    by_name: Mapping[str, list[Op]]
    returned: frozenset[int]
    names: Mapping[int, str]
    ordered: dict[int, tuple[Any, ...] | None] = field(
        default_factory=dict[int, "tuple[Any, ...] | None"]
    )

    def named(self, op: str) -> Sequence[Op]:
        if op.startswith("aten."):
            target = aten(op.removeprefix("aten."))
            return [o for o in self.flat.ops if o.target is target]
        return self.by_name.get(op, ())

    def is_value(self, what: Any) -> bool:
        return isinstance(what, Op)

    def op(self, value: Op) -> str:
        name = self.names.get(value.index)
        if name is not None:
            return name
        return str(value.target) if value.kind == "op" else ""

    def args(self, value: Op) -> tuple[Any, ...] | None:
        found = self.ordered.get(value.index, False)
        if found is False:
            found = self.ordered[value.index] = _ordered(value)
        return found  # type: ignore[return-value]

    def raw(self, value: Op) -> tuple[str, tuple[Any, ...], Mapping[str, Any]]:
        if value.kind != "op":
            return "", (), {}
        return str(value.target), tuple(_plain(a) for a in value.args), value.kwargs

    def users(self, value: Op) -> Sequence[Op]:
        return value.users

    def rank(self, value: Op) -> int | None:
        tensor = value.tensor
        return tensor.ndim if tensor is not None else None


_WITH_DTYPE = frozenset(
    n for n, w in OPS.items() if w.parameters[-1].name == "dtype" and not w.parameters[-1].required
)
"""Ops whose last parameter is a dtype; their input's own says nothing."""


def _ordered(op: Op) -> tuple[Any, ...] | None:
    form = forms().get(op.target)
    if form is None:
        return tuple(_plain(a) for a in op.args)
    args, kwargs = op.args, op.kwargs
    count = len(args)
    for index, name, default in form.others:
        given = args[index] if index < count else kwargs.get(name, default)
        if given != default:
            return None
    found: list[Any] = []
    for place, unsaid in zip(form.places, form.defaults, strict=True):
        if place is None:
            found.append(unsaid)
            continue
        index, name, default = place
        found.append(_plain(args[index] if index < count else kwargs.get(name, default)))
    if form.name in _WITH_DTYPE and isinstance(found[0], Op) and found[0].tensor is not None:
        own = str(found[0].tensor.dtype).removeprefix("torch.")
        found = [*found[:-1], None if found[-1] == own else found[-1]]
    if form.name == "split":
        found[1] = _parts(op, *found)
    return tuple(found)


def _parts(op: Op, x: Any, parts: Any, dim: Any) -> Any:
    """A split into equal parts is their number, whichever of ATen's ways it was written."""
    if op.target is ATEN.chunk.default:
        return parts
    if isinstance(parts, tuple):
        return len(parts) if len(set(parts)) == 1 else parts  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    tensor = x.tensor if isinstance(x, Op) else None
    size = tensor.shape[dim] if tensor is not None and isinstance(dim, int) else None
    if isinstance(size, int) and isinstance(parts, int) and parts and size % parts == 0:
        return size // parts
    return (parts,)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    return value


def program_view(flat: Flat) -> ProgramView:
    """The view of a flat Program: one pass over its ops.

    >>> import torch
    >>> from graftc.program.capture import capture
    >>> from graftc.program.flat import flatten
    >>> from graftc.program.model import Model
    >>> program = capture(Model(torch.nn.Softmax(-1), {"input": torch.zeros(2, 3)}))
    >>> view = program_view(flatten(program))
    >>> [view.args(v)[1:] for v in view.named("softmax")]
    [(-1, None)]
    """
    names = {target: form.name for target, form in forms().items()}
    names[operator.getitem] = GETITEM
    by_name: dict[str, list[Op]] = {}
    by_index: dict[int, str] = {}
    for op in flat.ops:
        if op.kind == "op":
            name = names.get(op.target)
            if name is not None:
                by_name.setdefault(name, []).append(op)
                by_index[op.index] = name
    return ProgramView(flat, by_name, frozenset(o.index for o in flat.outputs), by_index)


def ops_of(nodes: Sequence[fx.Node]) -> list[Op]:
    """Nodes as ops, to count them; what they read is there with its shape only."""
    env: dict[fx.Node, Op] = {}

    def op(node: fx.Node) -> Op:
        if node not in env:
            env[node] = Op(len(env), "value", node.target, (), {}, "", node)
        return env[node]

    for node in nodes:
        for source in node.all_input_nodes:
            op(source)
    return [
        Op(i, "op", n.target, _with_ops(n.args, env), _with_ops(dict(n.kwargs), env), "", n)
        for i, n in enumerate(nodes)
        if n.op == "call_function"
    ]


def graph_ops(graph: fx.Graph) -> Flat:
    """A single graph's ops as a flat view, for graphs that are no Program."""
    ops: list[Op] = []
    env: dict[fx.Node, Op] = {}
    outputs: tuple[Op, ...] = ()
    kinds = {"placeholder": "input", "get_attr": "param", "call_module": "module"}
    for node in graph.nodes:
        if node.op == "output":
            outputs = tuple(env[n] for n in node.all_input_nodes)
            continue
        args, kwargs = _with_ops(node.args, env), _with_ops(dict(node.kwargs), env)
        op = Op(len(ops), kinds.get(node.op, "op"), node.target, args, kwargs, "", node)
        for operand in dict.fromkeys(op.operands):
            operand.users.append(op)
        env[node] = op
        ops.append(op)
    return Flat(ops, [], outputs)


def _with_ops(value: Any, env: Mapping[fx.Node, Op]) -> Any:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (tuple, list)):
        return tuple(_with_ops(v, env) for v in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {k: _with_ops(v, env) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value
