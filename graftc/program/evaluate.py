"""Run a few ops of a Program on numbers of our own, at the example's sizes or at others.

Some questions about a value are answered best by computing it: which features a movement
brings where, which tokens a mask hides, which activation a formula is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graftc.program.flat import Op
from graftc.program.program import ATEN, size_hint

Parameters = Callable[[str], torch.Tensor | None]


class CannotEvaluateError(Exception):
    """A value needs something that is not at hand: an input, weights on the meta device, an opaque op."""


def evaluate(
    op: Op,
    given: dict[int, Any],
    sizes: Mapping[str, int] | None = None,
    parameters: Parameters | None = None,
) -> Any:
    """The value of `op` from `given` (op index → value), which is filled on the way.

    `sizes`: symbol → size, for a dynamic dimension; absent, the example's. `parameters`: the values of
    parameters and buffers by qualified name. Raises CannotEvaluateError.
    """
    known = sizes or {}
    stack = [op]
    while stack:
        current = stack[-1]
        if current.index in given:
            stack.pop()
            continue
        if (found := _immediate(current, known, parameters)) is not None:
            given[current.index] = found
            stack.pop()
            continue
        missing = [o for o in data_operands(current) if o.index not in given]
        if missing:
            stack += missing
            continue
        given[current.index] = _call(current, given, known)
        stack.pop()
    return given[op.index]


def _immediate(op: Op, sizes: Mapping[str, int], parameters: Parameters | None) -> Any:
    """What needs no operand: a size, a device, a dtype, a parameter."""
    if op.kind == "param":
        found = parameters(op.fqn) if parameters is not None else None
        if found is None or found.is_meta:
            raise CannotEvaluateError(f"{op.fqn} has no values")
        return found.detach()
    if op.kind != "op":
        raise CannotEvaluateError(f"{op} is not given")
    val = op.node.meta.get("val")
    if isinstance(val, (int, torch.SymInt)) and not isinstance(val, bool):
        return size_at(val, sizes)
    if op.target is ATEN.sym_size.int:
        shape = op.args[0].tensor.shape
        return size_at(shape[op.args[1]], sizes)
    if op.target is getattr:
        owner, name = op.args
        return torch.device("cpu") if name == "device" else getattr(owner.tensor, name)
    return None


_LIKE = ("aten.new_", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like")


def data_operands(op: Op) -> list[Op]:
    """The operands whose values an op reads, not only their sizes, dtype or device."""
    val = op.node.meta.get("val")
    if op.kind != "op" or op.target in (ATEN.sym_size.int, getattr):
        return []
    if isinstance(val, (int, torch.SymInt)) and not isinstance(val, bool):
        return []
    return op.operands[1:] if str(op.target).startswith(_LIKE) else op.operands


def size_at(size: int | torch.SymInt, sizes: Mapping[str, int]) -> int:
    """A dimension at chosen sizes of the symbols, the example's for those that are not chosen."""
    if isinstance(size, int) or not sizes:
        return size_hint(size)
    expression = size.node.expr
    chosen = {s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes}
    if len(chosen) < len(expression.free_symbols):
        return size_hint(size)
    return int(expression.subs(chosen))


def _call(op: Op, given: Mapping[int, Any], sizes: Mapping[str, int]) -> Any:
    def concrete(value: Any) -> Any:
        if isinstance(value, Op):
            if value.index in given:
                return given[value.index]
            return torch.empty(
                [size_at(s, sizes) for s in value.tensor.shape], dtype=value.tensor.dtype
            )
        if isinstance(value, (tuple, list)):
            return [concrete(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args = [concrete(a) for a in op.args]
    try:
        return op.target(*args, **{k: concrete(v) for k, v in op.kwargs.items()})
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        raise CannotEvaluateError(f"{op}: {error}") from error
