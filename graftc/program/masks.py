"""What a mask hides: the future, or something else. Told by computing it, whatever built it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graftc.program.evaluate import (
    CannotEvaluateError,
    Parameters,
    data_operands,
    evaluate,
    size_at,
)
from graftc.program.flat import Op
from graftc.program.ops import MASKINGS, SUMS
from graftc.program.program import ATEN, size_hint

Form = Literal["additive", "boolean", "hidden"]
_HIDDEN = -1e3
_LARGEST = 2**24


@dataclass(frozen=True, eq=False)
class Masking:
    """A mask on the scores. `form`: added to them, True where seen, or True where hidden."""

    mask: Op
    form: Form


@dataclass(frozen=True)
class Reading:
    """What a mask does: `causal`, hides every later token; `other`, anything beside that."""

    causal: bool
    other: bool


def maskings(on_way: list[Op], score: Op) -> tuple[Masking, ...]:
    """The masks among the ops between scores and softmax."""
    found: list[Masking] = []
    ours = {score.index, *(o.index for o in on_way)}
    for op in on_way:
        if op.target in (ATEN.masked_fill.Scalar, ATEN.masked_fill.Tensor):
            found.append(Masking(op.args[1], "hidden"))
        elif op.target in MASKINGS:
            seen = isinstance(op.args[1], Op) and op.args[1].index in ours
            found.append(Masking(op.args[0], "boolean" if seen else "hidden"))
        elif op.target in SUMS:
            others = [a for a in op.args[:2] if isinstance(a, Op) and a.index not in ours]
            found += [Masking(a, "additive") for a in others]
    return tuple(found)


def form_of(mask: Op) -> Form:
    """The form of a mask as `scaled_dot_product_attention` takes it."""
    return "boolean" if mask.tensor is not None and mask.tensor.dtype == torch.bool else "additive"


def is_whole(given: Op, mask: Op) -> bool:
    """Whether a mask of the scores is an input as it came: [batch, heads, n, m], or [batch, n, m] for all heads.

    Told by moving the numbers of the input's elements: a mask cut or folded on the way is another.
    """
    if given.tensor is None or mask.tensor is None or mask.tensor.ndim not in (2, 4):
        return False
    shape = [size_hint(s) for s in given.tensor.shape]
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    try:
        found = evaluate(mask, {given.index: numbers.double()})
    except CannotEvaluateError:
        return False
    wanted = numbers.unsqueeze(1) if numbers.ndim == 3 else numbers
    return wanted.ndim == mask.tensor.ndim and torch.equal(
        found.double(), wanted.double().expand_as(found)
    )


def is_every(given: Op, found: Op, start: int, step: int) -> bool:
    """Whether a value is an input in another shape, of its last dimension from `start` on every `step`-th element."""
    if given.tensor is None:
        return False
    shape = [size_hint(s) for s in given.tensor.shape]
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    try:
        value = evaluate(found, {given.index: numbers.double()})
    except CannotEvaluateError:
        return False
    return torch.equal(value.double().flatten(), numbers[..., start::step].double().flatten())


def read(masking: Masking, parameters: Parameters | None, memo: dict[int, Reading]) -> Reading:
    """What a mask hides, with every token there (an input of ones); by its values at two lengths.

    A mask whose values cannot be had is one that does something else.
    """
    key = masking.mask.index
    if key not in memo:
        memo[key] = _read(masking, parameters)
    return memo[key]


def _read(masking: Masking, parameters: Parameters | None) -> Reading:
    shape = masking.mask.tensor.shape if masking.mask.tensor is not None else ()
    if torch.Size(size_hint(s) for s in shape).numel() > _LARGEST:
        return Reading(False, True)
    given_by = [o for o in _behind(masking.mask) if o.kind != "op"]
    symbols = {
        str(s) for d in shape if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols
    }
    lengths: list[Mapping[str, int]] = [{}]
    if symbols and len(shape) >= 2:
        by_name = {str(s): size_hint(d) for d in shape if isinstance(d, torch.SymInt)
                   for s in d.node.expr.free_symbols if d.node.expr.is_symbol}  # fmt: skip
        lengths.append({n: size + 5 for n, size in by_name.items()})
    try:
        values = [_value(masking.mask, given_by, sizes, parameters) for sizes in lengths]
    except CannotEvaluateError:
        return Reading(False, True)
    seen = [_seen(v, masking.form) for v in values]
    biased = masking.form == "additive" and any(bool((v[v > _HIDDEN] != 0).any()) for v in values)
    causal = all(_hides_the_future(s) for s in seen)
    if causal:
        plain = all(bool((s == torch.ones_like(s).tril()).all()) for s in seen)
    else:
        plain = all(bool(s.all()) for s in seen)
    data = any(o.tensor is not None and not _is_constant(o, parameters) for o in given_by)
    far = _has_far_constant(masking.mask, max(v.shape[-1] if v.ndim else 1 for v in values))
    return Reading(causal, biased or data or not plain or far)


def _behind(mask: Op) -> Iterator[Op]:
    """Every op whose value is in the mask, itself first."""
    seen: set[int] = set()
    stack = [mask]
    while stack:
        op = stack.pop()
        if op.index not in seen:
            seen.add(op.index)
            yield op
            stack += data_operands(op)


def _value(
    mask: Op, sources: list[Op], sizes: Mapping[str, int], parameters: Parameters | None
) -> Tensor:
    given: dict[int, Any] = {}
    for op in sources:
        tensor = op.tensor
        if tensor is None:
            continue
        shape = [size_at(s, sizes) for s in tensor.shape]
        if op.kind == "input":
            given[op.index] = torch.ones(shape, dtype=tensor.dtype)
        elif op.kind == "param" and tensor.dtype.is_floating_point and not _has(op, parameters):
            given[op.index] = torch.zeros(shape, dtype=tensor.dtype)
    found = evaluate(mask, given, sizes, parameters)
    if not isinstance(found, Tensor):
        raise CannotEvaluateError(f"{mask} is no tensor")
    return found


def _has(op: Op, parameters: Parameters | None) -> bool:
    found = parameters(op.fqn) if parameters is not None else None
    return found is not None and not found.is_meta


def _is_constant(op: Op, parameters: Parameters | None) -> bool:
    """A buffer that is no float is a table of the code's; an input or a weight is data."""
    return (
        op.kind == "param" and _has(op, parameters) and not isinstance(
            parameters(op.fqn) if parameters else None, torch.nn.Parameter
        )
    )  # fmt: skip


def _seen(mask: Tensor, form: Form) -> Tensor:
    if form == "additive":
        return mask > _HIDDEN
    return ~mask.bool() if form == "hidden" else mask.bool()


def _hides_the_future(seen: Tensor) -> bool:
    if seen.ndim < 2 or seen.shape[-1] != seen.shape[-2] or seen.shape[-1] < 2:
        return False
    return not bool(seen.triu(1).any())


def _has_far_constant(mask: Op, length: int) -> bool:
    """A number beyond the lengths tried (a window of 4,096): what it does there is not known."""
    return any(
        isinstance(a, (int, float)) and not isinstance(a, bool) and length <= abs(a) < 2**30
        for op in _behind(mask)
        if op.kind == "op" and op.target.__name__.partition(".")[0] in _COMPARING
        for a in op.args
    )


_COMPARING = frozenset(
    {"sub", "add", "lt", "le", "gt", "ge", "eq", "ne", "rsub", "floor_divide", "remainder"}
)
