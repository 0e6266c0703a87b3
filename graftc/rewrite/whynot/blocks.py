"""Block sets where a chain is shorter than they are, or is not the one that they name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from graftc.diagnostics import GraftError, Span
from graftc.language.blocks import portion, select
from graftc.language.rules import Blocks, Range
from graftc.program.analysis import Analysis, Site
from graftc.program.chains import Chain
from graftc.rewrite.measured import block_values
from graftc.rewrite.whynot.change import Change

_MISSPELT = 0.4
"""A chain's name that differs by no more is meant."""


@dataclass(frozen=True)
class Chosen:
    """What a block set means in one chain: blocks that are there, and numbers that are past its end.

    `change`: what has to be said of the chain itself (its name is misspelt, or is not given).
    """

    chain: Chain
    inside: tuple[int, ...]
    beyond: tuple[int, ...]
    change: Change | None
    span: Span

    def beyond_change(self) -> Change:
        """What is wrong with the blocks past the end."""
        length = len(self.chain)
        said = (
            f"not in the model: the chain `{self.chain.name}` has {length} blocks, 0..{length - 1}"
        )
        return Change("beyond", 1.0, said, self.span, f"write `blocks {written(self.inside)}`")

    def outside_change(self, index: int) -> Change:
        """What is wrong with a block that the set leaves out."""
        wider = sorted({*self.inside, index})
        said = f"block {index} is not in the set: it means {written(self.inside)}"
        return Change("block", 1.5, said, self.span, f"write `blocks {written(wider)}`")


def chosen(blocks: Blocks, analysis: Analysis, sites: Collection[Site] = ()) -> tuple[Chosen, ...]:
    """What a block set means, in each chain that it may be about; the likeliest first.

    `sites`: what a measured set ranks blocks by.
    """
    return tuple(
        Chosen(chain, *_indices(blocks, chain, analysis, sites), change, blocks.span)
        for chain, change in _chains(blocks, analysis)
    )


def _chains(blocks: Blocks, analysis: Analysis) -> list[tuple[Chain, Change | None]]:
    named = blocks.chain
    span = blocks.chain_span or blocks.span
    chains = analysis.chains
    names = ", ".join(f'"{c.name}"' for c in chains)
    if named is None:
        if len(chains) < 2:
            return [(c, None) for c in chains]
        said = f"the model has several chains: {names}"
        return [
            (c, Change("chain", 0.5, said, span, f'write `blocks of "{c.name}" …`')) for c in chains
        ]
    exact = [c for c in chains if c.name == named]
    if exact:
        return [(c, None) for c in exact]
    scored = sorted(
        ((1 - SequenceMatcher(None, named, c.name, autojunk=False).ratio(), c) for c in chains),
        key=lambda s: s[0],
    )
    return [
        (
            c,
            Change(
                "chain", 0.5 + distance, f'the chain is "{c.name}"', span,
                f'write `blocks of "{c.name}" …`',
            ),
        )
        for distance, c in (scored[:1] if scored and scored[0][0] <= _MISSPELT else scored)
    ]  # fmt: skip


def _indices(
    blocks: Blocks, chain: Chain, analysis: Analysis, sites: Collection[Site]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(blocks that are there, numbers past the end) of a set."""
    length = len(chain)
    wanted: set[int]
    if blocks.kind == "ranges":
        wanted = set(_of(blocks.ranges))
    elif blocks.kind in ("first", "last"):
        count = portion(blocks.count, length) if blocks.fraction else int(blocks.count)
        start = 0 if blocks.kind == "first" else max(0, length - count)
        wanted = set(range(start, start + count))
    else:
        try:
            values = block_values(blocks, chain, analysis, sites)
            return select(blocks, length, chain.name, values), ()
        except GraftError:  # not measured: any block may be meant, and `match` says what is missing
            return tuple(range(length)), ()
    wanted -= set(_of(blocks.excluded))
    return (
        tuple(sorted(i for i in wanted if 0 <= i < length)),
        tuple(sorted(i for i in wanted if i >= length)),
    )


def _of(ranges: tuple[Range, ...]) -> Iterator[int]:
    for r in ranges:
        yield from range(r.first, r.last + 1, max(1, r.step))


def written(indices: Collection[int]) -> str:
    """Block numbers as the language writes them.

    >>> written((0, 1, 2, 4)), written((3, 4, 5)), written((7,)), written(())
    ('{0..2, 4}', '3..5', '{7}', 'none')
    """
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    parts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}..{b}" for a, b in runs]
    if not parts:
        return "none"
    if len(runs) == 1 and runs[0][1] > runs[0][0]:
        return f"{runs[0][0]}..{runs[0][1]}"
    return "{" + ", ".join(parts) + "}"
