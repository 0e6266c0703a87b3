"""What a model costs: FLOPs of one forward pass of one sample, parameters.

A multiply-add counts as two FLOPs. Attention is 4·N²·D for its two products and two FLOPs
for each score (paper, section H.1 as re-derived from table 4); element-wise work is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from graftc.program.flat import Flat, Op
from graftc.program.program import ATEN, Program, size_hint


def flops_by_path(flat: Flat, batch: int) -> dict[str, int]:
    """Module path → FLOPs of one sample in it and below ('' is the whole model)."""
    totals: dict[str, int] = {}
    for op in flat.ops:
        count = op_flops(op)
        if not count:
            continue
        path = op.path
        while True:
            totals[path] = totals.get(path, 0) + count
            if not path:
                break
            path = path.rpartition(".")[0]
    return {path: total // max(1, batch) for path, total in totals.items()}


def parameter_count(program: Program, path: str = "") -> int:
    """Parameters of a module, each once."""
    return sum(p.numel() for p in program.root.get_submodule(path).parameters())


def op_flops(op: Op) -> int:
    """FLOPs of one op at the example's sizes."""
    rule = _RULES.get(op.target) if op.kind == "op" else None
    return rule(op) if rule else 0


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(size_hint(s) for s in value.tensor.shape)


def _linear(op: Op) -> int:
    return 2 * prod(_shape(op)) * _shape(op.args[1])[-1]


def _matmul(op: Op) -> int:
    return 2 * prod(_shape(op)) * _shape(op.args[0])[-1]


def _addmm(op: Op) -> int:
    return 2 * prod(_shape(op)) * _shape(op.args[1])[-1]


def _baddbmm(op: Op) -> int:
    return 2 * prod(_shape(op)) * _shape(op.args[1])[-1]


def _einsum(op: Op) -> int:
    """A product over all its indices; one operand is a movement or a sum."""
    terms = str(op.args[0]).replace(" ", "").partition("->")[0].split(",")
    operands = op.args[1]
    if len(terms) < 2 or "." in "".join(terms):
        return 0
    sizes = {
        i: n
        for t, o in zip(terms, operands, strict=True)
        for i, n in zip(t, _shape(o), strict=True)
    }
    return 2 * prod(sizes.values())


def _conv(op: Op) -> int:
    return 2 * prod(_shape(op)) * prod(_shape(op.args[1])[1:])


def _attention(op: Op) -> int:
    q, k, v = (_shape(a) for a in op.args[:3])
    scores = prod(q[:-1]) * k[-2]
    return scores * (2 * q[-1] + 2 * v[-1] + 2)


_RULES: Mapping[Any, Callable[[Op], int]] = {
    ATEN.linear.default: _linear,
    ATEN.matmul.default: _matmul,
    ATEN.bmm.default: _matmul,
    ATEN.mm.default: _matmul,
    ATEN.addmm.default: _addmm,
    ATEN.baddbmm.default: _baddbmm,
    ATEN.einsum.default: _einsum,
    ATEN.conv1d.default: _conv,
    ATEN.conv2d.default: _conv,
    ATEN.conv3d.default: _conv,
    ATEN.scaled_dot_product_attention.default: _attention,
}
