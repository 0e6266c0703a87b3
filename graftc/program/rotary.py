"""Rotary positions: that q is multiplied by a table, and in which form where an operator can take it over."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from graftc.program.evaluate import CannotEvaluateError, evaluate
from graftc.program.flat import Op, strip
from graftc.program.ops import MOVEMENTS
from graftc.program.program import ATEN, size_hint

_LARGEST = 2**24


@dataclass(frozen=True, eq=False)
class Rotary:
    """source · cos + rotated(source) · sin: `half` turns halves, `interleaved` neighbours; of a wider source the first features.

    `pairs` is `interleaved` with one angle a pair: cos and sin have half as many features.
    """

    cos: Op
    sin: Op
    form: Literal["half", "interleaved", "pairs"]
    source: Op


def is_rotary(query: Op, linears: tuple[Op, ...]) -> bool:
    """Whether q is multiplied, on its way from its linear, by a table that is another at another token."""
    return bool(_products(query, linears))


def _products(query: Op, linears: tuple[Op, ...]) -> list[tuple[Op, Op, Op]]:
    """(product, what comes from q, the table) for each product with a table."""
    inside = {o.index for o in linears}
    reaches: dict[int, bool] = {}

    def from_linear(op: Op) -> bool:
        if op.index not in reaches:
            reaches[op.index] = op.index in inside or (
                op.kind == "op"
                and op.target is not ATEN.sym_size.int
                and op.index > min(inside)
                and any(from_linear(o) for o in op.operands)
            )
        return reaches[op.index]

    found: list[tuple[Op, Op, Op]] = []
    seen: set[int] = set()
    stack = [query]
    while stack:
        op = stack.pop()
        if op.index in seen or op.index in inside or not from_linear(op):
            continue
        seen.add(op.index)
        factors = op.args[:2] if op.target is ATEN.mul.Tensor else ()
        if len(factors) == 2 and all(isinstance(a, Op) for a in factors):
            ours = [a for a in factors if from_linear(a)]
            tables = [a for a in factors if not from_linear(a)]
            if len(tables) == 1 and _is_table(tables[0]):
                found.append((op, ours[0], tables[0]))
        stack += op.operands
    return found


def _is_table(op: Op) -> bool:
    """More than one row: a norm's weight has one, and a scale is one number."""
    if op.tensor is None:
        return False
    shape = [size_hint(s) for s in op.tensor.shape]
    return len(shape) >= 2 and torch.Size(shape[:-1]).numel() > 1


def rotary_of(query: Op, linears: tuple[Op, ...]) -> Rotary | None:
    """The tables and the form, where q is x · cos + rotated(x) · sin; else None.

    Of the whole x, or of its first features with the rest as they are (GPT-NeoX).
    """
    total = strip(query)
    if total.target in (ATEN.slice_scatter.default, ATEN.stack.default):
        return _of_pairs(total, linears)
    rest: Op | None = None
    if total.target is ATEN.cat.default and len(total.operands) == 2:
        total, rest = strip(total.operands[0]), total.operands[1]
    if total.target is not ATEN.add.Tensor:
        return None
    products = {p.index: (ours, table) for p, ours, table in _products(query, linears)}
    terms = [products.get(strip(a).index) for a in total.args[:2] if isinstance(a, Op)]
    if len(terms) != 2:
        return None
    first, second = terms
    if first is None or second is None:
        return None
    for (x, cos), (turned, sin) in ((first, second), (second, first)):
        form = _turn(x, turned)
        if form is not None and (rest is None or _follows(x, rest)):
            return Rotary(cos, sin, form, x if rest is None else rest.args[0])
    return None


def _of_pairs(total: Op, linears: tuple[Op, ...]) -> Rotary | None:
    """Where even and odd features are written one after the other (Wan) or stacked (Lumina): told by its values on random numbers."""
    parts = _products(total, linears)
    tables = list({t.index: t for _, _, t in parts}.values())
    sources = {strip(x).index: x for _, x, _ in parts}
    if len(parts) != 4 or len(tables) != 2 or len(sources) != 1:
        return None
    x = next(iter(sources.values()))
    wanted = [size_hint(s) for s in total.tensor.shape]
    if total.target is ATEN.stack.default:  # its last two dimensions are the pairs
        wanted = [*wanted[:-2], wanted[-2] * wanted[-1]]
    while x.target in MOVEMENTS or x.target is operator.getitem:
        x = x.args[0]
        if x.tensor is not None and [size_hint(s) for s in x.tensor.shape] == wanted:
            break
    shape = [size_hint(s) for s in x.tensor.shape] if x.tensor is not None else []
    if torch.Size(shape).numel() > _LARGEST:
        return None
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn([size_hint(s) for s in o.tensor.shape], generator=generator) for o in (x, *tables)]  # fmt: skip
    try:
        found = evaluate(total, {o.index: g for o, g in zip((x, *tables), given, strict=True)})
    except CannotEvaluateError:
        return None
    pairs = given[0].unflatten(-1, (-1, 2))
    for (cos, c), (sin, s) in permutations(zip(tables, given[1:], strict=True)):
        if c.shape[-1] != pairs.shape[-2]:
            return None
        one, two = pairs.unbind(-1)
        turned = torch.stack((one * c - two * s, two * c + one * s), dim=-1).flatten(-2)
        if found.numel() == turned.numel() and torch.allclose(
            found.reshape(turned.shape), turned, atol=1e-5
        ):
            return Rotary(cos, sin, "pairs", x)
    return None


def _follows(x: Op, rest: Op) -> bool:
    """Whether `x` is the first features of a tensor, and `rest` those after them."""
    if rest.target is not ATEN.slice.Tensor or x.tensor is None or rest.tensor is None:
        return False
    width, after = size_hint(x.tensor.shape[-1]), size_hint(rest.tensor.shape[-1])
    if rest.args[0] is x:  # all of it turns, and nothing is left (Phi-3)
        return after == 0
    if x.target is not ATEN.slice.Tensor or rest.args[0] is not x.args[0]:
        return False
    start = x.argument(2, "start")
    whole = size_hint(x.args[0].tensor.shape[-1])
    return start in (0, None) and rest.argument(2, "start") == width and width + after == whole


def _turn(x: Op, turned: Op) -> Literal["half", "interleaved"] | None:
    """What `turned` makes of x, by its values on the numbers 1, 2, 3, …"""
    if x is turned or x.tensor is None:
        return None
    shape = [size_hint(s) for s in x.tensor.shape]
    width = shape[-1]
    numbers = torch.arange(1.0, width + 1)
    try:
        found = evaluate(turned, {x.index: numbers.expand(shape)})
    except CannotEvaluateError:
        return None
    if not isinstance(found, Tensor) or list(found.shape) != shape or width % 2:
        return None
    row = found.reshape(-1, width)[0]
    first, second = numbers.chunk(2)
    if torch.equal(row, torch.cat([-second, first])):
        return "half"
    if torch.equal(row, torch.stack([-numbers[1::2], numbers[::2]], -1).flatten()):
        return "interleaved"
    return None
