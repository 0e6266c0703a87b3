"""Errors of a site by bins of the task's time, on the held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.distillation.targets import ModelInput

BINS = 8
_FEWEST = 4
"""Samples a bin on average, below which there are fewer bins."""


def times_of(prepared: Any, inputs: Sequence[ModelInput]) -> Tensor | None:
    """The time of each sample of a batch [B], in the task's own unit; None where it has none.

    It is the task's target `t`, or else the model's input that means a timestep.
    """
    given = dict(getattr(prepared, "targets", None) or {})
    time = given.get("t")
    if time is None:
        named = next((i.name for i in inputs if i.meaning == "timestep"), None)
        time = prepared.inputs.get(named)
    return time.detach().double().cpu() if isinstance(time, Tensor) and time.ndim == 1 else None


def edges_of(times: Tensor, bounds: tuple[float, float] | None) -> list[float]:
    """Edges of equal bins over `bounds` (None: what was seen); an empty bin joins its neighbour.

    >>> edges_of(torch.tensor([0.0, 10, 20, 30, 900, 910, 920, 990]), (0, 1000))
    [0.0, 500.0, 1000.0]
    """
    low, high = bounds or (float(times.min()), float(times.max()))
    low, high = float(min(low, times.min())), float(max(high, times.max()))
    count = max(1, min(BINS, len(times) // _FEWEST))
    if not high > low:
        return [low, high]
    kept = [low]
    for i in range(1, count + 1):
        end = low + (high - low) * i / count if i < count else high
        if bool(((times >= kept[-1]) & ((times < end) | (i == count))).any()):
            kept.append(end)
    kept[-1] = high
    return kept


class BinSums:
    """Squared errors and energies by bin, summed over batches."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = list(edges)
        self._inner = torch.tensor(self.edges[1:-1], dtype=torch.float64)
        self._error = torch.zeros(len(edges) - 1, dtype=torch.float64)
        self._energy = torch.zeros(len(edges) - 1, dtype=torch.float64)

    def add(self, times: Tensor, output: Tensor, target: Tensor) -> bool:
        """Take in a batch; False where its output has no samples to tell apart."""
        if output.numel() % len(times):
            return False
        wide = target.double().reshape(len(times), -1)
        error = (output.double().reshape(len(times), -1) - wide).square().sum(1).cpu()
        place = torch.bucketize(times, self._inner, right=True)
        self._error.index_add_(0, place, error)
        self._energy.index_add_(0, place, wide.square().sum(1).cpu())
        return True

    def sums(self) -> list[float]:
        """As numbers that add up over processes."""
        return [*self._error.tolist(), *self._energy.tolist()]

    @staticmethod
    def of(edges: Sequence[float], sums: Sequence[float]) -> BinSums:
        """What `sums` gave."""
        made, count = BinSums(edges), len(edges) - 1
        made._error = torch.tensor(sums[:count], dtype=torch.float64)
        made._energy = torch.tensor(sums[count:], dtype=torch.float64)
        return made

    def errors(self) -> list[float]:
        """‖student − teacher‖² / ‖teacher‖² of each bin."""
        return (self._error / self._energy).tolist()
