"""Which blocks of a chain a block set means, once the chain's length is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from graftc.diagnostics import fail
from graftc.language.rules import Blocks, Range


def select(
    blocks: Blocks, length: int, chain: str, values: Sequence[float] | None = None
) -> tuple[int, ...]:
    """The indices that `blocks` means in a chain of `length` blocks called `chain`, ascending.

    A fraction of the chain rounds half up: half of 27 blocks is 14. `values`: of each block, for a
    measured set; ties go to the lower index. Raises GraftError where a block is not in the chain,
    where nothing is left, and for a measured set without values.

    >>> from graftc.diagnostics import Source, Span
    >>> here = Span(Source("a.graft", ""), 0, 0)
    >>> select(Blocks("every", here, count=3, period=4, start=1), 12, "blocks")
    (1, 2, 3, 5, 6, 7, 9, 10, 11)
    >>> select(Blocks("last", here, count=0.5, fraction=True), 5, "blocks")
    (2, 3, 4)
    >>> select(Blocks("measured", here, count=2, top=False), 4, "blocks", [0.5, 0.1, 0.2, 0.1])
    (1, 3)
    """
    chosen = _base(blocks, length, chain, values)
    excluded = _indices(blocks.excluded, length, chain)
    if excluded and not excluded & set(chosen):
        fail(
            "G137",
            "`except` takes nothing out",
            span=blocks.span,
            wanted="blocks that the set holds",
            found=", ".join(map(str, sorted(excluded)[:8])),
            help="leave out the `except`, or name blocks of the set",
        )
    left = tuple(i for i in chosen if i not in excluded)
    if not left:
        fail(
            "G132",
            f"no block of `{chain}` is selected",
            span=blocks.span,
            found=f"{chain} has {_size(length)}",
            help="write `all`, or another set",
        )
    return left


def _size(length: int) -> str:
    return f"{length} blocks, 0..{length - 1}" if length > 1 else f"{length} block"


def _base(
    blocks: Blocks, length: int, chain: str, values: Sequence[float] | None
) -> tuple[int, ...]:
    kind = blocks.kind
    values = values if kind == "measured" else None
    if kind == "all":
        return tuple(range(length))
    if kind == "odd":
        return tuple(range(1, length, 2))
    if kind == "even":
        return tuple(range(0, length, 2))
    if kind == "every":
        start, period = blocks.start, max(1, blocks.period)
        return tuple(i for i in range(start, length) if (i - start) % period < blocks.count)
    if kind == "ranges":
        return tuple(sorted(_indices(blocks.ranges, length, chain)))
    if kind == "measured" and values is None:
        measure = blocks.measure.name if blocks.measure else "a measure"
        fail(
            "G135",
            f"which blocks these are depends on `{measure}`, measured on data",
            span=blocks.span,
            wanted="a `-d DATA` of raw samples to measure on",
            help="give `-d DATA` (and `-t TASK`, where the model names none), or name the blocks: `blocks {…}`",
        )
    count = portion(blocks.count, length) if blocks.fraction else int(blocks.count)
    word = ("top" if blocks.top else "bottom") if kind == "measured" else kind
    if count > length:
        fail(
            "G131",
            f"`{chain}` has fewer than {count} blocks",
            span=blocks.span,
            wanted=f"{word} {length} at most",
            found=f"{chain} has {_size(length)}",
            help=f"write `{word} {length}`, or `all`",
        )
    if values is not None:
        sign = -1.0 if blocks.top else 1.0
        ranked = sorted(range(length), key=lambda i: (sign * values[i], i))
        return tuple(sorted(ranked[:count]))
    return tuple(range(count)) if kind == "first" else tuple(range(length - count, length))


def portion(fraction: float, length: int) -> int:
    """A fraction of a chain as a number of blocks, half rounded up.

    >>> portion(0.5, 27), portion(0.1, 28)
    (14, 3)
    """
    return math.floor(round(fraction * length, 9) + 0.5)


def _indices(ranges: Iterable[Range], length: int, chain: str) -> set[int]:
    found: set[int] = set()
    for r in ranges:
        if r.first < 0 or r.last >= length:
            outside = r.first if r.first < 0 or r.first >= length else r.last
            last = length - 1
            inside = f"{r.first}..{last}" if r.first < last else f"{last}"
            fail(
                "G131",
                f"block {outside} is not in `{chain}`",
                span=r.span,
                wanted=f"0..{last}: `{chain}` has {length} blocks, the last is {last}",
                found=str(outside),
                help=f"write `{inside}`",
            )
        found.update(range(r.first, r.last + 1, max(1, r.step)))
    return found
