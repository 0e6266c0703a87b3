"""The batches that a model is measured on: a bounded number of samples of DATA, through the Task, by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.diagnostics import fail
from graftc.distillation.data import Task, prepare
from graftc.distillation.inputs import check_inputs
from graftc.distillation.sources import (
    Dataset,
    Sample,
    head,
    is_sized,
    length,
    seed_of,
    stack,
)
from graftc.distillation.targets import ModelInput
from graftc.program.analysis import Analysis

_TOKENS = 4096
_MOST = 16


@dataclass(frozen=True)
class Batches:
    """The model's inputs, batch by batch; `draw()` gives the same ones each time. `samples`: how many in all."""

    samples: int
    draw: Callable[[], Iterator[dict[str, Tensor]]]


def batches(analysis: Analysis, data: Any, task: Task, samples: int, seed: int) -> Batches:
    """The first `samples` of DATA (of a sized one: in a seeded order), each noised once by the Task.

    Batches hold at most 16 samples, and at most 4,096 tokens where a sample has fewer; a model with a fixed
    batch gets that. Raises GraftError: no sample asked for (G493), empty or bad DATA (G520 … G527), inputs that
    the model does not take (G530 … G533), fewer samples than a fixed batch (G495).
    """
    if samples < 1:
        fail("G493", "a measure needs one sample at least", site="--samples", found=str(samples))
    inputs = analysis.program.inputs
    wanted = [ModelInput(p.name, p.shape, p.dtype, p.meaning) for p in inputs]
    take, there = _numbered(data, samples, seed)
    fixed = next((p.shape[0] for p in inputs if p.shape), "batch")
    size = fixed if isinstance(fixed, int) else _batch(analysis)
    if isinstance(fixed, int):
        if there < fixed:
            fail("G495", f"the model's batch is fixed to {fixed}, and there are {there} samples to measure on",
                 site="--samples", wanted=f"{fixed} or more", found=str(there),
                 help="ask for more samples, or capture the model with a dynamic batch")  # fmt: skip
        there -= there % fixed

    def draw() -> Iterator[dict[str, Tensor]]:
        like = take(0, 1)[0][1]
        for number, start in enumerate(range(0, there, size)):
            places = range(start, min(start + size, there))
            raw = stack(take(start, len(places)), like)
            made = prepare(task, raw, [seed_of("measure", seed, p) for p in places]).inputs
            check_inputs(made, wanted, f"batch {number} of DATA")
            yield {p.name: made[p.name] for p in inputs}

    return Batches(there, draw)


def _numbered(
    data: Any, samples: int, seed: int
) -> tuple[Callable[[int, int], list[tuple[int, Sample]]], int]:
    """Numbered samples by position, and how many there are, at most `samples`."""
    if is_sized(data):
        size = length(data)
        if size == 0:
            fail("G520", "DATA is empty", site="DATA", wanted="at least one sample", found="0")
        return Dataset(data, range(size), seed).take, min(samples, size)
    kept = list(enumerate(head(data, samples, "DATA")))
    return (lambda first, count: kept[first : first + count]), len(kept)


def _batch(analysis: Analysis) -> int:
    tokens = [s.facts.get("tokens") for s in analysis.sites]
    longest = max((t for t in tokens if isinstance(t, int)), default=1)
    return max(1, min(_MOST, _TOKENS // longest))
