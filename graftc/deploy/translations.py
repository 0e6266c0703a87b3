"""Operators that torch's own translation to ONNX gets wrong, translated here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ATen operator → its form in ONNX.

    `remainder.Scalar` by a size: torchlib asks for a number, and a dynamic size is none.
    """
    return {torch.ops.aten.remainder.Scalar: _remainder}


def _remainder(self: Any, other: Any) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18
    divisor = op.CastLike(other, self)
    if self.dtype.is_integer():
        return op.Mod(self, divisor)
    return op.Sub(self, op.Mul(op.Floor(op.Div(self, divisor)), divisor))
