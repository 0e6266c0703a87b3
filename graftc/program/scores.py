"""A cap on the scores of an attention, between their product and the softmax."""

from __future__ import annotations

from collections.abc import Collection

from graftc.program.flat import Op
from graftc.program.ops import MASKINGS, MOVEMENTS, SUMS
from graftc.program.program import ATEN
from graftc.program.qk import factor_of


def is_bounded(way: Collection[Op]) -> bool:
    """Whether there is a tanh on the way from the product to the softmax."""
    return any(o.target is ATEN.tanh.default for o in way)


def softcap_of(softmax: Op, product: Op, way: Collection[Op]) -> float | None:
    """The cap c where the softmax is of c · tanh(factor · product) and masks after it; None where it is not.

    `way`: the ops between the product and the softmax.
    """
    ours = {o.index for o in way if o is not softmax}
    factor, cap = 1.0, None
    op = softmax.args[0]
    while op.index in ours:
        if (number := factor_of(op)) is not None:
            factor *= number[0]
            op = number[1]
        elif op.target is ATEN.tanh.default and cap is None:
            cap, op = factor, op.args[0]
        elif op.target in MOVEMENTS:
            op = op.args[0]
        elif op.target in MASKINGS or op.target in SUMS:
            inside = [a for a in op.args if isinstance(a, Op) and a.index in ours]
            if cap is not None or factor != 1.0 or len(inside) != 1:
                return None
            op = inside[0]
        else:
            return None
    return cap if op is product and cap is not None and cap > 0 else None
