"""Which activation a formula is: told by its values, so that GELU written out with tanh is GELU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftc.program.evaluate import CannotEvaluateError, evaluate
from graftc.program.flat import Op
from graftc.program.ops import POINTWISE

_KNOWN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
}
_SAMPLE = torch.linspace(-6, 6, 97)


def activation_of(source: Op, result: Op) -> str | None:
    """The name of the activation that takes `source` to `result`, None where it is linear; 'other' if unknown."""
    try:
        y: Any = evaluate(result, {source.index: _SAMPLE.double()})
    except CannotEvaluateError:
        return "other"
    if not isinstance(y, Tensor) or y.shape != _SAMPLE.shape:
        return "other"
    y = y.float()
    steps = y.diff()
    if torch.allclose(steps, steps[0].expand_as(steps), atol=1e-5):
        return None
    for name, known in _KNOWN.items():
        if torch.allclose(y, known(_SAMPLE), atol=1e-5):
            return name
    return "other"


def pointwise_source(op: Op, depth: int = 32) -> Op | None:
    """The one value that `op` is a pointwise function of (with constants): where the formula begins.

    None where two values meet, as in a gate, or nothing is computed.
    """
    seen: set[int] = set()
    sources: set[Op] = set()
    stack = [op]
    while stack:
        current = stack.pop()
        if current.index in seen:
            continue
        seen.add(current.index)
        if current.kind == "op" and current.target in POINTWISE and len(seen) <= depth:
            stack += current.operands
        else:
            sources.add(current)
    return sources.pop() if len(sources) == 1 else None
