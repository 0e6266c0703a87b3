"""Whether two arguments of ops are the same: values by identity, numbers to single precision, dims modulo the rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from graftc.language.dataflow_ops import Kind


def opened(value: Any) -> Iterator[Any]:
    """The values in a list, or the value."""
    if isinstance(value, tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from opened(item)
    else:
        yield value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same value, number or list."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        pairs = zip(one, other, strict=False)  # pyright: ignore[reportUnknownVariableType]
        return len(one) == len(other) and all(same(a, b) for a, b in pairs)  # pyright: ignore[reportUnknownArgumentType]
    plain = (int, float, bool, str)
    return isinstance(one, plain) and isinstance(other, plain) and equal(one, other)


def equal(one: Any, other: Any) -> bool:
    """Numbers to single precision (a written 0.7071068 is the root of a half); words exactly."""
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=0.0)
    return type(one) is type(other) and one == other


def same_constant(wanted: Any, actual: Any, kind: Kind, rank: int | None) -> bool:
    """Whether a written constant is what stands there, as its parameter's kind compares."""
    if wanted is None or actual is None:
        return wanted is actual
    if kind in ("dim", "dims"):
        if isinstance(wanted, int) and isinstance(actual, int):
            return wanted % rank == actual % rank if rank else wanted == actual
        one, other = _dims(wanted, rank), _dims(actual, rank)
        if one is None or other is None:
            return False
        return one == other
    if isinstance(actual, tuple):
        return all(same_constant(wanted, a, kind, rank) for a in actual)  # pyright: ignore[reportUnknownVariableType]
    if kind == "flag":
        return bool(wanted) == bool(actual)
    return equal(wanted, actual)


def _dims(value: Any, rank: int | None) -> tuple[int, ...] | None:
    items: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(i, int) for i in items):
        return None
    return tuple(i % rank if rank else i for i in items)
