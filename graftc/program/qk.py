"""What q and k go through between their linears and the attention: a norm, rotary positions, a factor."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from graftc.program.evaluate import CannotEvaluateError, data_operands, evaluate
from graftc.program.flat import Op, backward, strip
from graftc.program.ops import MOVEMENTS, NORM_PARTS
from graftc.program.program import ATEN, size_hint
from graftc.program.refusals import op_name
from graftc.program.rotary import Rotary, rotary_of

Kind = Literal["rms_norm", "layer_norm"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last dimension: `kind`(source) · (weight + plus) + bias is `end`; `width`: of what it norms.

    `weight` and `bias` are parameters, None where it has none.
    """

    kind: Kind
    width: int
    eps: float
    weight: Op | None
    bias: Op | None
    plus: float
    source: Op
    end: Op


@dataclass(frozen=True, eq=False)
class Route:
    """The way of one linear's result to the attention.

    `unread`: the first op, from the attention on, that is neither a movement, a norm, rotary positions,
    a factor nor a concatenation of streams. `hops`: index of an op → the op after it on the way whose features are
    the same ones in the same places.
    """

    linear: Op
    norm: Norm | None
    rotary: Rotary | None
    scale: float
    hops: Mapping[int, Op]
    unread: Op | None


def route(end: Op, linear: Op) -> Route:
    """How `linear` becomes `end`, read backwards from there."""
    norm: Norm | None = None
    rotary: Rotary | None = None
    scale, hops = 1.0, dict[int, Op]()
    op = end
    while op is not linear:
        if _is_movement(op):
            op = op.args[0]
        elif rotary is None and norm is None and (turned := rotary_of(op, (linear,))) is not None:
            rotary, op = turned, turned.source
        elif (factor := factor_of(op)) is not None:
            value, source = factor
            scale *= value
            hops[source.index] = op
            op = source
        elif norm is None and (found := _norm_at(op, linear)) is not None:
            norm = found
            hops[found.source.index] = op
            op = found.source
        elif (stream := _stream_of(op, linear)) is not None:
            op = stream
        else:
            return Route(linear, norm, rotary, scale, hops, op)
    return Route(linear, norm, rotary, scale, hops, None)


def _is_movement(op: Op) -> bool:
    moves = op.target in MOVEMENTS or op.target is operator.getitem
    return op.kind == "op" and moves and bool(op.args) and isinstance(op.args[0], Op)


def factor_of(op: Op) -> tuple[float, Op] | None:
    """(number, x) where `op` is x times a number."""
    if op.kind != "op" or len(op.args) < 2:
        return None
    x, number = op.args[:2]
    product = op.target in (ATEN.mul.Tensor, ATEN.mul.Scalar)
    if product and not isinstance(x, Op):
        x, number = number, x
    if not isinstance(x, Op) or not _is_number(number):
        return None
    if product:
        return float(number), x
    return (1 / number, x) if op.target in (ATEN.div.Tensor, ATEN.div.Scalar) else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stream_of(op: Op, linear: Op) -> Op | None:
    """Of token streams that are put together, the one that comes from `linear`."""
    if op.target is not ATEN.cat.default:
        return None
    found = [o for o in op.operands if o is linear or backward(o, lambda p: p is linear)]
    return found[0] if len(found) == 1 else None


def _norm_at(op: Op, linear: Op) -> Norm | None:
    """The norm that ends in `op`: one op, or written out."""
    if op.target in (ATEN.rms_norm.default, ATEN.layer_norm.default):
        return _norm_op(op)
    for source in _sources(op, linear):
        region = _region(op, source)
        if any(o.target in NORM_PARTS for o in region):
            return _written_out(op, source, region)
    return None


def _norm_op(op: Op) -> Norm | None:
    source, shape = op.args[:2]
    if len(shape) != 1:
        return None
    layer = op.target is ATEN.layer_norm.default
    eps = op.argument(4, "eps", 1e-5) if layer else op.argument(3, "eps")
    if eps is None:
        eps = torch.finfo(source.tensor.dtype).eps
    weight, bias = op.argument(2, "weight"), op.argument(3, "bias") if layer else None
    given = [strip(p) for p in (weight, bias) if p is not None]
    if any(p.kind != "param" for p in given):
        return None
    return Norm(
        "layer_norm" if layer else "rms_norm",
        size_hint(shape[0]),
        float(eps),
        None if weight is None else strip(weight),
        None if bias is None else strip(bias),
        0.0,
        source,
        op,
    )


def _sources(op: Op, linear: Op) -> Iterator[Op]:
    """Ops without which no value of `linear` reaches `op`, the nearest first, the linear last."""
    for candidate in _region(op, linear)[1:]:
        if not backward(op, lambda o, c=candidate: o is c or o is linear).count(linear):
            yield candidate
    yield linear


def _region(op: Op, start: Op) -> list[Op]:
    """The ops that lie between `start`, which is left out, and `op`, which is in; the last first."""
    memo: dict[int, bool] = {start.index: True}

    def reached(o: Op) -> bool:
        if o.index not in memo:
            memo[o.index] = (
                o.kind == "op"
                and o.index > start.index
                and any(reached(p) for p in data_operands(o))
            )
        return memo[o.index]

    found: dict[int, Op] = {}
    stack = [op]
    while stack:
        current = stack.pop()
        if current.index not in found and current is not start and reached(current):
            found[current.index] = current
            stack += data_operands(current)
    return [found[i] for i in sorted(found, reverse=True)]


def _written_out(op: Op, source: Op, region: Sequence[Op]) -> Norm | None:
    """The norm that a formula is, told by its values on numbers large and small."""
    width = size_hint(source.tensor.shape[-1])
    operands = {o.index: o for r in region for o in r.operands}
    learned = _behind(operands.values(), {r.index for r in region} | {source.index})
    if len(learned) > 2 or any(list(o.tensor.shape) != [width] for o in learned):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator) * torch.tensor([[1.0], [0.1], [0.01], [0.001]])
    values = {o.index: torch.randn(width, generator=generator) for o in learned}
    try:
        made = evaluate(op, {source.index: x, **values})
    except CannotEvaluateError:
        return None
    if not isinstance(made, Tensor) or made.shape != x.shape:
        return None
    numbers = {float(a) for r in region for a in (*r.args, *r.kwargs.values()) if _is_number(a)}
    small = sorted(n for n in numbers if 0 < n < 1e-2)
    for names in permutations(learned):
        weight, bias = (*names, None, None)[:2]
        tries = product(("rms_norm", "layer_norm"), (0.0, 1.0) if weight else (0.0,), small)
        for kind, plus, eps in tries:
            w = None if weight is None else values[weight.index] + plus
            b = None if bias is None else values[bias.index]
            if torch.allclose(_norm(kind, x, w, b, eps), made.float(), rtol=1e-4, atol=1e-6):
                return Norm(kind, width, eps, weight, bias, plus, source, op)
    return None


def _behind(operands: Any, inside: set[int]) -> list[Op]:
    """The parameters that a region reads, as they are or after ops of their own."""
    found: dict[int, Op] = {}
    stack = [o for o in operands if o.index not in inside]
    while stack:
        op = stack.pop()
        if op.kind == "param":
            found[op.index] = op
        elif op.kind == "op" and op.tensor is not None and op.tensor.ndim <= 1:
            stack += data_operands(op)
    return [found[i] for i in sorted(found)]


def _norm(kind: Kind, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if kind == "layer_norm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps) + (0 if bias is None else bias)


def norm_facts(
    q: Sequence[Route], k: Sequence[Route], head_dim: int, heads: int, kv_heads: int
) -> dict[str, int | float | bool | str | None]:
    """What an operator must know of the norms of q and k to have the same; `qk_norm = other` where they are none of its."""
    norms = [r.norm for r in (*q, *k)]
    unread = next((r.unread for r in (*q, *k) if r.unread is not None), None)
    if unread is not None:
        return {"qk_norm": "other", "unread": op_name(unread)}
    if None in norms and any(norms):
        return {"qk_norm": "other"}
    known = {
        (
            n.kind,
            _over(n.width, head_dim, heads if i < len(q) else kv_heads),
            n.eps,
            n.weight is not None,
        )
        for i, n in enumerate(norms)
        if n is not None
    }
    if not known:
        return {"qk_norm": "none"}
    if len(known) > 1 or any(over is None for _, over, _, _ in known):
        return {"qk_norm": "other"}
    ((kind, over, eps, affine),) = known
    return {"qk_norm": kind, "norm_over": over, "norm_eps": eps, "norm_affine": affine}


def _over(width: int, head_dim: int, heads: int) -> str | None:
    return {heads * head_dim: "width", head_dim: "head"}.get(width)
