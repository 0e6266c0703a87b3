"""Random draws of a Task, each row of a batch from a seed of its own.

A sample then has the same noise whatever batch, rank or run it is prepared in. A Task draws with `randn`, `rand` and
`randint` of this module; one that draws from its generator directly is right as well, but is called sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_DIRECT = 0
_STRIDE = 0x9E3779B97F4A7C15
"""An odd constant: seeds of one row's draws differ, and do not meet another row's next draw."""


class Rows(torch.Generator):
    """A CPU generator for a batch: `seeds[i]` is row i's.

    A draw that does not go through this module uses the generator itself; `drawn_directly` then tells.
    """

    def __new__(cls, seeds: Sequence[int]) -> Rows:
        return super().__new__(cls)

    def __init__(self, seeds: Sequence[int]) -> None:
        self.manual_seed(_DIRECT)
        self.seeds = tuple(seeds)
        self._draws = 0
        self._row = torch.Generator()
        self._before = self.get_state()

    def fill(self, empty: Tensor, draw: Callable[..., Any]) -> Tensor:
        """`empty` with row i filled by `draw(row, generator=…)`; a draw is not repeated by the next."""
        if len(empty) != len(self.seeds):
            raise ValueError(f"a draw of {len(empty)} rows in a batch of {len(self.seeds)}")
        for seed, row in zip(self.seeds, empty.unbind(), strict=True):
            draw(row, generator=self._row.manual_seed((seed + _STRIDE * self._draws) % 2**63))
        self._draws += 1
        return empty

    @property
    def drawn_directly(self) -> bool:
        """Whether anything was drawn from the generator itself, where rows share their noise."""
        return not torch.equal(self._before, self.get_state())


def randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal draws, float32, batch first.

    >>> both, second = (randn((len(s), 2), Rows(s)) for s in ([5, 9], [9]))
    >>> torch.equal(both[1:], second)
    True
    """
    if not isinstance(generator, Rows):
        return torch.randn(tuple(shape), generator=generator)
    return generator.fill(torch.empty(tuple(shape), device="cpu"), Tensor.normal_)


def rand(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform draws in [0, 1), float32, batch first."""
    if not isinstance(generator, Rows):
        return torch.rand(tuple(shape), generator=generator)
    return generator.fill(torch.empty(tuple(shape), device="cpu"), Tensor.uniform_)


def randint(high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Integers in [0, high), int64, batch first."""
    if not isinstance(generator, Rows):
        return torch.randint(high, tuple(shape), generator=generator)
    empty = torch.empty(tuple(shape), dtype=torch.int64, device="cpu")
    return generator.fill(empty, lambda row, generator: row.random_(0, high, generator=generator))
