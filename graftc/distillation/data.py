"""Batches from what the user's DATA function returned: checked, in a seeded order, resumable.

DATA is a data set (sized, indexable) or an iterable of raw samples; a sample is a dict of tensors
or numbers. The order of indices is a function of (seed, epoch), a sample's noise of (seed, its place in
that order): a resumed run needs the step's number and nothing else, and a process that takes some rows of
a batch sees what one that takes all would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from graftc.diagnostics import Diagnostic, GraftError, fail
from graftc.distillation.out_of_memory import is_out_of_memory
from graftc.distillation.sources import (
    Dataset,
    Sample,
    Source,
    Stream,
    describe,
    head,
    is_sized,
    length,
    permutation,
    seed_of,
    shape_text,
    stack,
)
from graftc.tasks.noise import Rows

HELD_OUT = 0.1
MOST_HELD_OUT = 256
_SPLIT_SEED = 0


class Prepared(Protocol):
    """What a Task's `prepare` returns: named model inputs, and targets of the loss."""

    @property
    def inputs(self) -> dict[str, Tensor]: ...

    def to(self, device: Any) -> Prepared: ...


class Task(Protocol):
    """The part of a Task that training calls (`graftc.tasks.Task`)."""

    def prepare(self, sample: Any, generator: torch.Generator) -> Any: ...

    def loss(self, outputs: Any, prepared: Any) -> Tensor: ...

    def metrics(self, outputs: Any, prepared: Any) -> dict[str, float]: ...


@dataclass(frozen=True)
class Data:
    """Training samples in order, and the held-out ones.

    `size` is the number of distinct training samples (None: unknown); `held_out` is kept in memory.
    `shared`: the held-out samples are trained on too, since there are no others.
    """

    source: Source
    held_out: tuple[Sample, ...]
    first: Sample
    seed: int
    shared: bool = False

    @property
    def size(self) -> int | None:
        return self.source.size

    def raw(self, step: int, batch: int, rows: range | None = None) -> Sample:
        """The raw batch of a step: `batch` samples stacked, or `rows` of them."""
        chosen = range(batch) if rows is None else rows
        return stack(self.source.take(step * batch + chosen.start, len(chosen)), self.first)

    def prepared(
        self, task: Task, step: int, batch: int, phase: str, rows: range | None = None
    ) -> Any:
        """The batch of a step through the task, or `rows` of it (a process's share).

        A sample's noise is a function of (seed, phase, its place in the run's order of samples).
        """
        chosen = range(batch) if rows is None else rows
        seeds = [seed_of("noise", self.seed, phase, step * batch + row) for row in chosen]
        return prepare(task, self.raw(step, batch, rows), seeds)

    def validation(self, task: Task, batch: int, rows: range | None = None) -> Iterator[Any]:
        """The held-out batches, or those of the held-out samples `rows`; a sample always has the same noise."""
        chosen = range(len(self.held_out)) if rows is None else rows
        numbered = [(number, self.held_out[number]) for number in chosen]
        for start in range(0, len(numbered), batch):
            part = numbered[start : start + batch]
            seeds = [seed_of("validation", number) for number, _ in part]
            yield prepare(task, stack(part, self.first), seeds)


def open_data(
    data: Any,
    *,
    seed: int = 0,
    fraction: float | None = None,
    samples: int | None = None,
    held_out: float | int = HELD_OUT,
    validation: Any = None,
) -> Data:
    """DATA ready for training.

    `fraction` is a seeded subset of a sized DATA, `samples` at most so many. `held_out` is a share
    (below 1, and at most 256) or a count, split off with a fixed seed, so that every run and stage
    holds out the same samples. `validation` is a DATA of its own for that instead: its first 256.

    Raises GraftError: empty (G520), bad samples (G521, G522), a share of an unsized DATA (G524),
    an object that yields nothing (G525).

    >>> data = open_data([{"x": float(i)} for i in range(20)], held_out=4)
    >>> data.size, len(data.held_out), data.raw(0, 2)["x"].shape
    (16, 4, torch.Size([2]))
    """
    given = None if validation is None else head(validation, MOST_HELD_OUT, "held-out DATA")
    if not is_sized(data):
        if fraction is not None:
            fail("G524", "`data` asks for a share of DATA, and DATA has no length", site="DATA",
                 wanted="a DATA with `__len__` and `__getitem__`", found=type(data).__name__,
                 help="give a count instead: `samples = 8k`")  # fmt: skip
        held = given or head(data, _held_count(held_out, samples or 640), "DATA")
        stream = Stream(data, 0 if given else len(held), samples)
        return Data(stream, held, held[0], seed)
    size = length(data)
    if size == 0:
        fail("G520", "DATA is empty", site="DATA", wanted="at least one sample", found="0")
    indices = list(range(size))
    shared = given is None and size == 1  # a single sample is both
    if given is None:
        order = permutation(size, "split", _SPLIT_SEED)
        chosen = order[: min(_held_count(held_out, size), max(1, size - 1))]
        indices = sorted(order[len(chosen) :]) or chosen
        given = tuple(
            sample for _, sample in Dataset(data, chosen, _SPLIT_SEED).take(0, len(chosen))
        )
    wanted = len(indices) if fraction is None else max(1, round(len(indices) * fraction))
    wanted = min(wanted, samples or wanted)
    if wanted < len(indices):
        order = permutation(len(indices), "subset", seed)
        indices = [indices[i] for i in sorted(order[:wanted])]
    return Data(Dataset(data, indices, seed), given, given[0], seed, shared)


def _held_count(held_out: float | int, size: int) -> int:
    """How many samples to hold out of `size`: a count as it is, a share up to 256."""
    if held_out >= 1:
        return int(held_out)
    return max(1, min(MOST_HELD_OUT, round(size * held_out)))


def prepare(task: Task, raw: Sample, seeds: Sequence[int]) -> Any:
    """The task's `prepare` on a batch, its noise drawn from a seed for each sample.

    A task that draws from its generator directly is called sample by sample (`graftc.tasks.noise`).
    What it raises is told with what the batch holds (G526).
    """
    rows = Rows(seeds)
    try:
        made = task.prepare(raw, rows)
        if not rows.drawn_directly:
            return made
        return joined(
            [
                task.prepare(
                    {name: value[i : i + 1] for name, value in raw.items()},
                    torch.Generator().manual_seed(seed),
                )
                for i, seed in enumerate(seeds)
            ]
        )
    except GraftError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # no fault of the task
            raise
        held = "; ".join(f"{name} {shape_text(value)}" for name, value in raw.items())
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = f"the task cannot prepare a batch of DATA: {reason}"
        raise GraftError(Diagnostic("G526", text, site="DATA", found=held)) from error


def joined(parts: Sequence[Any]) -> Any:
    """What a task prepared of single samples as one batch: tensors, and dicts of them, put together.

    Raises GraftError (G534) for a value that is neither and that differs from sample to sample.
    """
    first = parts[0]
    made = {name: _joined(name, [getattr(p, name) for p in parts]) for name in vars(first)}
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **made)
    whole = copy.copy(first)
    for name, value in made.items():
        setattr(whole, name, value)
    return whole


def _joined(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        keys = cast("Mapping[str, Any]", first)
        return {key: _joined(key, [value[key] for value in values]) for key in keys}
    if isinstance(first, Tensor):
        if first.ndim and all(len(value) == 1 for value in values):
            return torch.cat(values)
        same = all(torch.equal(first, value) for value in values)
    else:
        same = all(first == value for value in values)
    if same:
        return first  # a table, or a word, that all samples share
    fail("G534", f"what the task prepared as `{name}` cannot be put together to a batch",
         site="TASK.prepare", wanted="tensors, batch first", found=describe(first),
         help="draw with graftc.tasks.noise, and the task gets the whole batch")  # fmt: skip
