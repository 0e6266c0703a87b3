"""A bounded replay of the teacher's batches, between streaming (each used once) and caching (kept for good).

A window of K teacher batches serves K × R steps. In its first turn each batch is used as it comes; in
each further turn, step j's sample i is sample i of one of the K batches, each exactly once a turn, by a
draw from the seed. Rows keep their place, so a process that holds some rows of each batch mixes them as
one that holds all would.

Everything is a function of the step: a resumed run makes the batches of its window anew, at most K
teacher passes. They are not in the checkpoint, which would grow by gigabytes each minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from graftc.diagnostics import fail
from graftc.distillation.activations import Batch
from graftc.distillation.buffer import Shelves, Tensors
from graftc.distillation.loss import finite
from graftc.distillation.sizes import Layout
from graftc.distillation.sources import seeded
from graftc.distillation.targets import Cut


@dataclass(frozen=True)
class Window:
    """`batches` teacher batches are kept at a time, and each is used for `reuse` steps.

    >>> window = Window(batches=2, reuse=3)
    >>> [window.at(step) for step in (0, 1, 2, 5, 6)]
    [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 1), (2, 0, 0)]
    >>> window.passes(8)
    4
    """

    batches: int
    reuse: int

    def at(self, step: int) -> tuple[int, int, int]:
        """A step's (number of its window's first batch, turn, place in the turn)."""
        window, place = divmod(step, self.batches * self.reuse)
        turn, place = divmod(place, self.batches)
        return window * self.batches, turn, place

    def passes(self, steps: int) -> int:
        """Teacher passes that so many steps need."""
        whole, rest = divmod(steps, self.batches * self.reuse)
        return whole * self.batches + min(rest, self.batches)


@lru_cache(maxsize=8)
def mixture(batches: int, rows: int, *key: int | str) -> tuple[tuple[int, ...], ...]:
    """For each place of a turn and each row, which batch of the window the row comes from.

    >>> drawn = mixture(3, 2, "seed", 0)
    >>> [sorted(column) for column in zip(*drawn, strict=True)]
    [[0, 1, 2], [0, 1, 2]]
    """
    order = torch.rand(batches, rows, generator=seeded("mix", *key)).argsort(0)
    return tuple(tuple(row) for row in order.tolist())


@dataclass
class Replay:
    """Batches of a phase with reuse; `fresh(cuts, number)` is the teacher's batch of that number.

    `batch` is the whole batch, of which this process has the rows `rows` (all, if None). With `cache`,
    batches of earlier windows stay, and each holds all cuts of the layout, whoever asks first.
    """

    fresh: Callable[[Sequence[Cut], int], Batch]
    window: Window
    shelves: Shelves
    layout: Layout
    key: tuple[int | str, ...]
    batch: int
    rows: range | None = None
    device: str = "cpu"
    cache: bool = False

    def at(self, cuts: Sequence[Cut], step: int) -> Batch:
        first, turn, place = self.window.at(step)
        if not self.cache:
            self.shelves.drop(below=first)
        try:
            return self._at(cuts, step, first, turn, place)
        finally:
            self.shelves.rest()

    def _at(self, cuts: Sequence[Cut], step: int, first: int, turn: int, place: int) -> Batch:
        names = self.layout.wanted(cuts)
        if turn == 0:
            number = first + place
            made = self._made(cuts, number)
            found = made or {n: self.shelves.whole(number, n, self.device) for n in names}
            return self._batch(cuts, {n: found[n] for n in names}, f"step {step}")
        chosen = range(self.batch) if self.rows is None else self.rows
        drawn = mixture(self.window.batches, self.batch, *self.key, first, turn)[place]
        numbers = [first + drawn[row] for row in chosen]
        for number in sorted(set(numbers)):
            self._made(cuts, number)
        found = {n: self._mixed(n, numbers) for n in names}
        return self._batch(cuts, found, f"step {step}, of batches used before")

    def _mixed(self, name: str, numbers: Sequence[int]) -> torch.Tensor:
        rows = self.layout.tensors[name].rows
        if rows == 0:
            return self.shelves.whole(numbers[0], name, self.device)
        return self.shelves.mixed(numbers, name, rows, self.device)

    def _made(self, cuts: Sequence[Cut], number: int) -> Tensors | None:
        """A batch that was not kept yet: made and kept. Raises GraftError for one that is not finite."""
        if self.shelves.has(number):
            return None
        wanted = tuple(self.layout.places) if self.cache else tuple(dict.fromkeys(cuts))
        batch = self.fresh(wanted, number)
        tensors = {f"input.{name}": value for name, value in batch.inputs.items()}
        for cut, values in zip(wanted, batch.values, strict=True):
            for name, value in zip(self.layout.places[cut], values, strict=True):
                if value.is_floating_point() and not finite(value):
                    fail("G546", f"the teacher gives no finite values at `{cut.output}`, {batch.where}",
                         site=cut.output, found="NaN or Inf, and nothing of this batch is kept",
                         help="look at DATA for this batch, at the teacher's weights, "
                              "or at its precision")  # fmt: skip
                tensors[name] = value
        self.shelves.put(number, tensors)
        return tensors

    def _batch(self, cuts: Sequence[Cut], found: Tensors, where: str) -> Batch:
        inputs = {n.removeprefix("input."): v for n, v in found.items() if n.startswith("input.")}
        values = tuple([found[name] for name in self.layout.places[cut]] for cut in cuts)
        return Batch(inputs, values, where)
