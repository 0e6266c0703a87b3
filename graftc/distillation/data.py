"""Batches from what the user's DATA function returned: checked, in a seeded order, resumable.

DATA is a data set (sized, indexable) or an iterable of raw samples; a sample is a dict of tensors
or numbers. The order of indices is a function of (seed, epoch), the noise of (seed, step): a
resumed run needs the step's number and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graftc.diagnostics import Diagnostic, GraftError, fail
from graftc.distillation.sources import (
    Dataset,
    Sample,
    Source,
    Stream,
    head,
    is_sized,
    length,
    permutation,
    seeded,
    shape_text,
    stack,
)

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
    """

    source: Source
    held_out: tuple[Sample, ...]
    first: Sample
    seed: int

    @property
    def size(self) -> int | None:
        return self.source.size

    def raw(self, step: int, batch: int) -> Sample:
        """The raw batch of a step: `batch` samples stacked."""
        return stack(self.source.take(step * batch, batch), self.first)

    def prepared(self, task: Task, step: int, batch: int, phase: str) -> Any:
        """The batch of a step through the task, its noise drawn from (seed, phase, step)."""
        return prepare(task, self.raw(step, batch), seeded("noise", self.seed, phase, step))

    def validation(self, task: Task, batch: int) -> Iterator[Any]:
        """The held-out batches, always with the same noise."""
        numbered = list(enumerate(self.held_out))
        for number, start in enumerate(range(0, len(numbered), batch)):
            raw = stack(numbered[start : start + batch], self.first)
            yield prepare(task, raw, seeded("validation", number))


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
    if given is None:
        order = permutation(size, "split", _SPLIT_SEED)
        chosen = order[: min(_held_count(held_out, size), max(1, size - 1))]
        indices = sorted(order[len(chosen) :]) or chosen  # a single sample is both
        given = tuple(
            sample for _, sample in Dataset(data, chosen, _SPLIT_SEED).take(0, len(chosen))
        )
    wanted = len(indices) if fraction is None else max(1, round(len(indices) * fraction))
    wanted = min(wanted, samples or wanted)
    if wanted < len(indices):
        order = permutation(len(indices), "subset", seed)
        indices = [indices[i] for i in sorted(order[:wanted])]
    return Data(Dataset(data, indices, seed), given, given[0], seed)


def _held_count(held_out: float | int, size: int) -> int:
    """How many samples to hold out of `size`: a count as it is, a share up to 256."""
    if held_out >= 1:
        return int(held_out)
    return max(1, min(MOST_HELD_OUT, round(size * held_out)))


def prepare(task: Task, raw: Sample, generator: torch.Generator) -> Any:
    """The task's `prepare`, an error in it told with what the batch holds (G526)."""
    try:
        return task.prepare(raw, generator)
    except GraftError:
        raise
    except Exception as error:
        held = "; ".join(f"{name} {shape_text(value)}" for name, value in raw.items())
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = f"the task cannot prepare a batch of DATA: {reason}"
        raise GraftError(Diagnostic("G526", text, site="DATA", found=held)) from error
