"""Modules that a capture graph calls on values as they are made: they add up what is measured, and return nothing.

What they are given can go as soon as they have seen it, so a pass holds no more than the model's own does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import fail
from graftc.measures.attention import mass_by_distance, mass_of_weights
from graftc.measures.moments import Moments, cosines
from graftc.program.measured import Statistics


class Observer(nn.Module):
    """Sums over all calls; `site` is what is measured."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def not_finite(self, what: str) -> None:
        """Raise the error for a teacher whose values cannot be measured."""
        fail(
            "G489",
            f"the teacher's {what} holds values that are not finite",
            site=self.site,
            wanted="finite activations on the samples of DATA",
            help="run the teacher itself on such a sample: its weights, its dtype or the sample are at fault",
        )


class LocalityObserver(Observer):
    """Attention mass by distance, of what an attention op reads, or of the weights that the model makes."""

    def __init__(self, site: str, *, written_out: bool, causal: bool, scale: float | None) -> None:
        super().__init__(site)
        self.written_out = written_out
        self.causal = causal
        self.scale = scale
        self.sums: Tensor | None = None

    @torch.no_grad()
    def forward(self, first: Tensor, key: Tensor | None = None, mask: Tensor | None = None) -> None:
        if self.written_out:
            found = mass_of_weights(first)
        else:
            assert key is not None
            found = mass_by_distance(first, key, mask, causal=self.causal, scale=self.scale)
        if not bool(torch.isfinite(found).all()):
            self.not_finite("attention")
        self.sums = found if self.sums is None else self.sums + found

    def within(self) -> Tensor | None:
        """The share of the mass within each distance, [n] float64; None where every row is hidden."""
        if self.sums is None or float(self.sums.sum()) == 0:
            return None
        running = self.sums.cpu().cumsum(0)
        return running / running[-1]


class InfluenceObserver(Observer):
    """The mean over tokens of the cosine similarity between a block's input and output stream."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.sums = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def forward(self, before: Tensor, after: Tensor) -> None:
        found = cosines(before, after).cpu()
        if not bool(torch.isfinite(found).all()):
            self.not_finite("residual stream")
        self.sums = self.sums + found

    def influence(self) -> float:
        """1 − the mean cosine similarity: ShortGPT's block influence."""
        return 1.0 - float(self.sums[0] / self.sums[1])


class StatisticsObserver(Observer):
    """Moments of everything that a site gives."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.moments = Moments()

    @torch.no_grad()
    def forward(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.moments = self.moments + Moments.of(value)
        found = self.moments
        if not all(map(_finite, (found.mean, found.m2, found.m4, found.absmax))):
            self.not_finite("output")

    def statistics(self) -> Statistics | None:
        return self.moments.statistics() if self.moments.count else None


def _finite(number: float) -> bool:
    return abs(number) < float("inf")
