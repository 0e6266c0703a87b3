"""A flat view of a Program: single ops with their operands, across module boundaries.

Roles and costs are about ops, wherever a module boundary happens to lie. The view inlines
every `call_module` in reading order and remembers, for each op, which module it stands in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from graftc.program.program import ATEN, Program, join


@dataclass(frozen=True, eq=False)
class Op:
    """One op, input or parameter. `kind`: 'input', 'param', 'op', 'module' (opaque).

    `args`: the op's arguments with `Op` in place of nodes. `path`: the module it stands in;
    `fqn`: a parameter's qualified name.
    """

    index: int
    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    node: fx.Node
    fqn: str = ""
    users: list[Op] = field(default_factory=lambda: list[Op]())

    @property
    def operands(self) -> list[Op]:
        return list(_ops_in((self.args, self.kwargs)))

    @property
    def tensor(self) -> Any:
        """The fake tensor this op makes, None if it makes none."""
        val = self.node.meta.get("val")
        return val if isinstance(val, torch.Tensor) else None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        if len(self.args) > index:
            return self.args[index]
        return self.kwargs.get(name, default)

    def __repr__(self) -> str:
        return f"Op({self.index}, {self.target}, {self.path})"


def _ops_in(value: Any) -> Iterator[Op]:
    if isinstance(value, Op):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _ops_in(v)
    elif isinstance(value, dict):
        for v in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _ops_in(v)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its path, the graph that calls it, what it is given and returns."""

    path: str
    graph: str
    node: fx.Node
    args: tuple[Any, ...]
    result: Any


@dataclass(frozen=True, eq=False)
class Flat:
    """All ops in execution order, inputs first, all calls of modules, inner ones first, and what is returned."""

    ops: list[Op]
    calls: list[Call]
    outputs: tuple[Op, ...] = ()

    @cached_property
    def called_paths(self) -> frozenset[str]:
        return frozenset(c.path for c in self.calls)

    @cached_property
    def calls_by_path(self) -> dict[str, list[Call]]:
        """Path → all its calls, in order."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.path, []).append(call)
        return found

    @cached_property
    def first_calls(self) -> dict[str, Call]:
        """Path → its first call."""
        found: dict[str, Call] = {}
        for call in self.calls:
            found.setdefault(call.path, call)
        return found

    def called(self, path: str) -> str:
        """The nearest module at or above `path` that a graph calls ('' is root): `ff` for its container `ff.net`."""
        while path and path not in self.called_paths:
            path = path.rpartition(".")[0]
        return path


def flatten(program: Program) -> Flat:
    """The flat view of a Program."""
    ops: list[Op] = []
    calls: list[Call] = []

    def add(
        kind: str, target: Any, args: Any, kwargs: Any, path: str, node: fx.Node, fqn: str = ""
    ) -> Op:
        op = Op(len(ops), kind, target, args, kwargs, path, node, fqn)
        for operand in dict.fromkeys(op.operands):
            operand.users.append(op)
        ops.append(op)
        return op

    def run(module: fx.GraphModule, path: str, given: list[Any]) -> Any:
        env: dict[fx.Node, Any] = {}
        inputs = iter(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node.op == "get_attr":
                env[node] = add(
                    "param", node.target, (), {}, path, node, join(path, str(node.target))
                )
            elif node.op == "output":
                return _resolve(node.args[0], env)
            else:
                args, kwargs = _resolve(node.args, env), _resolve(dict(node.kwargs), env)
                if node.op == "call_module":
                    inner = module.get_submodule(str(node.target))
                    where = join(path, str(node.target))
                    if isinstance(inner, fx.GraphModule):
                        env[node] = run(inner, where, list(args))
                    else:
                        env[node] = add("module", inner, args, kwargs, where, node)
                    calls.append(Call(where, path, node, args, env[node]))
                elif node.target is operator.getitem and not isinstance(args[0], Op):
                    env[node] = args[0][args[1]]
                else:
                    env[node] = add("op", node.target, args, kwargs, path, node)
        return None

    placeholders = [n for n in program.root.graph.nodes if n.op == "placeholder"]
    given = [add("input", n.target, (), {}, "", n) for n in placeholders]
    returned = run(program.root, "", given)
    return Flat(ops, calls, tuple(_ops_in(returned)))


def _resolve(value: Any, env: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (tuple, list)):
        return tuple(_resolve(v, env) for v in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {k: _resolve(v, env) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value


def backward(start: Op, stop: Callable[[Op], bool]) -> list[Op]:
    """The ops nearest behind `start` (itself excluded) for which `stop` holds, walking operands."""
    found: list[Op] = []
    seen: set[int] = set()
    stack = list(start.operands)
    while stack:
        op = stack.pop()
        if op.index in seen or op.target is ATEN.sym_size.int:
            continue  # a size is no data: what it is the size of does not flow on
        seen.add(op.index)
        if stop(op):
            found.append(op)
        else:
            stack.extend(op.operands)
    return sorted(found, key=lambda o: o.index)


def strip(op: Op) -> Op:
    """What `op` is a movement of: the op that made its values."""
    from graftc.program.ops import MOVEMENTS

    while op.kind == "op" and (op.target in MOVEMENTS or op.target is operator.getitem):
        if not op.args or not isinstance(op.args[0], Op):
            break
        op = op.args[0]
    return op


def common_path(ops: list[Op]) -> str:
    """The deepest module path that holds all ops.

    >>> import types
    >>> common_path([types.SimpleNamespace(path="a.b.c"), types.SimpleNamespace(path="a.b.d")])
    'a.b'
    """
    parts = [op.path.split(".") if op.path else [] for op in ops]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        common.append(level[0])
    return ".".join(common)


LINEAR_COUNT = 2  # a block has at least two weight matrices; a lone linear or activation is none


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's graph calls no other module."""
    return isinstance(module, fx.GraphModule) and not any(
        n.op == "call_module" for n in module.graph.nodes
    )
