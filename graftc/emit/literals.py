"""Values as Python syntax: nodes, numbers, dtypes, slices, lists of such."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

Operand = Callable[[fx.Node], ast.expr]


def literal(value: Any, operand: Operand) -> ast.expr:
    """An argument as syntax: a node, a number, a dtype, a list of such.

    >>> ast.unparse(literal([1, torch.float32, None], lambda n: ast.Name(n.name)))
    '[1, torch.float32, None]'
    """
    if isinstance(value, fx.Node):
        return operand(value)
    if isinstance(value, (list, tuple)):
        elements = [literal(v, operand) for v in cast("list[Any]", value)]
        return ast.Tuple(elements) if isinstance(value, tuple) else ast.List(elements)
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return ast.Dict(
            [literal(k, operand) for k in entries], [literal(v, operand) for v in entries.values()]
        )
    if isinstance(value, slice):
        return index(value, operand)
    if isinstance(value, float) and not math.isfinite(value):
        return parse(f'float("{value}")')
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return parse(str(value))
    if isinstance(value, torch.device):
        return parse(f'torch.device("{value}")')
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, str)):
        return ast.Constant(value)
    raise TypeError(f"no Python literal for {type(value).__name__}")


def parse(text: str) -> ast.expr:
    """Python text as syntax."""
    return ast.parse(text, mode="eval").body


def index(value: Any, operand: Operand) -> ast.expr:
    """What stands between the brackets of `x[…]`."""
    if isinstance(value, tuple):
        return ast.Tuple([index(v, operand) for v in cast("tuple[Any, ...]", value)])
    if isinstance(value, slice):
        parts = [
            None if p is None else literal(p, operand)
            for p in (value.start, value.stop, value.step)
        ]
        return cast("ast.expr", ast.Slice(*parts))
    if value is Ellipsis:
        return ast.Constant(...)
    return literal(value, operand)


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen node by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def plain_call(function: str, node: fx.Node, operand: Operand) -> ast.expr:
    return ast.Call(
        parse(function),
        [literal(a, operand) for a in node.args],
        [ast.keyword(k, literal(v, operand)) for k, v in node.kwargs.items()],
    )
