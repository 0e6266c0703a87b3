"""ATen operators whose Python depends on their arguments: indexing, and what a template cannot say."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from graftc.emit.literals import Operand, index, literal, parse, plain_call

# A whole dimension's end, as capture writes it.
_TO_THE_END = 2**62


def _leading(dim: int, ndim: int | None, last: ast.expr) -> ast.expr:
    """`[:, :, last]` for dimension `dim`; from the end for a negative one."""
    if dim == -1 and ndim != 1:
        return ast.Tuple([ast.Constant(...), last])
    whole: list[ast.expr] = [cast("ast.expr", ast.Slice()) for _ in range(dim)]
    return ast.Tuple([*whole, last]) if whole else last


def _ndim(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None


def _slice(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    dim, start, end, step = given["dim"], given["start"], given["end"], given["step"]
    if not isinstance(dim, int) or dim < -1:
        return None
    start = None if start == 0 else start
    end = None if isinstance(end, int) and end >= _TO_THE_END else end
    step = None if step == 1 else step
    bounds = index(slice(start, end, step), operand)
    return ast.Subscript(operand(given["self"]), _leading(dim, _ndim(given["self"]), bounds))


def _select(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    dim = given["dim"]
    # A negative index is fine; a dimension counted from the end is not worth a reader's time.
    if not isinstance(dim, int) or dim < -1 or isinstance(given["index"], fx.Node):
        return None
    at = literal(given["index"], operand)
    return ast.Subscript(operand(given["self"]), _leading(dim, _ndim(given["self"]), at))


def _gather(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    """`x[:, rows]`: indexing by tensors."""
    whole = cast("ast.expr", ast.Slice())
    at = [whole if i is None else literal(i, operand) for i in given["indices"]]
    return ast.Subscript(operand(given["self"]), ast.Tuple(at) if len(at) > 1 else at[0])


def _squeeze(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    """A squeeze of a dimension that is not 1 does nothing here, and is an error in ONNX."""
    value = given["self"].meta.get("val") if isinstance(given["self"], fx.Node) else None
    size = value.shape[given["dim"]] if isinstance(value, torch.Tensor) and value.ndim else None
    return operand(given["self"]) if isinstance(size, int) and size != 1 else None


def _einsum(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    if given.get("path") is not None:
        return None
    tensors = [literal(t, operand) for t in given["tensors"]]
    return ast.Call(parse("torch.einsum"), [ast.Constant(given["equation"]), *tensors], [])


def _sum_with_factor(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    """`add(x, y, alpha=2)` has no infix form that rounds alike."""
    if given.get("alpha", 1) == 1:
        return None
    return plain_call(f"torch.{'sub' if 'sub' in str(node.target) else 'add'}", node, operand)


def _dropout(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    return operand(given["input"]) if given["train"] is False else None


def _dim_arange(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    if not isinstance(given.get("start", 0), int) or given.get("start", 0) != 0:
        return None
    keywords = [
        ast.keyword(k, literal(given[k], operand))
        for k in ("dtype", "device")
        if given[k] is not None
    ]
    return ast.Call(parse("torch.arange"), [literal(given["end"], operand)], keywords)


SPECIAL: dict[str, Callable[[fx.Node, dict[str, Any], Operand], ast.expr | None]] = {
    "slice.Tensor": _slice,
    "select.int": _select,
    "einsum.default": _einsum,
    "squeeze.dim": _squeeze,
    "index.Tensor": _gather,
    "add.Tensor": _sum_with_factor,
    "sub.Tensor": _sum_with_factor,
    "rsub.Scalar": lambda n, g, o: None,
    "dropout.default": _dropout,
    "arange.start": _dim_arange,
}
