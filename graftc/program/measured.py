"""What was measured at a site on data, and how: plain values that guards, block sets and tables read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graftc.diagnostics import Diagnostic

MEASURES = ("locality", "influence", "mean", "std", "absmax", "kurtosis")
FAMILY: Mapping[str, str] = {
    "locality": "locality",
    "influence": "influence",
    **dict.fromkeys(("mean", "std", "absmax", "kurtosis"), "statistics"),
}
"""Measure → the part of a capture pass that gives it."""


@dataclass(frozen=True)
class Statistics:
    """Of all elements of a site's output: mean, standard deviation, largest absolute value, kurtosis.

    Kurtosis is the fourth standardised moment, E[(x − μ)⁴] / σ⁴: 3 for a normal distribution, more where
    there are outliers, None where the output is constant.
    """

    mean: float
    std: float
    absmax: float
    kurtosis: float | None


@dataclass(frozen=True, eq=False)
class SiteMeasures:
    """What was measured at one site; None where it was not asked for, or is not defined there.

    `within`: [tokens] float64, entry k is the share of attention mass within |i − j| ≤ k. `why`: family → why the
    site has none of it, a sentence.
    """

    within: Tensor | None = None
    influence: float | None = None
    statistics: Statistics | None = None
    why: Mapping[str, str] | None = None

    def value(self, name: str, band: int | None = None) -> float | None:
        """A measure by its name; None where the site has it not.

        >>> import torch
        >>> site = SiteMeasures(within=torch.tensor([0.5, 0.75, 1.0]))
        >>> site.value("locality", 1), site.value("locality", 99), site.value("influence")
        (0.75, 1.0, None)
        """
        if name == "locality":
            if self.within is None or band is None:
                return None
            return float(self.within[min(band, len(self.within) - 1)])
        if name == "influence":
            return self.influence
        return getattr(self.statistics, name) if self.statistics is not None else None


@dataclass(frozen=True)
class MeasuredOn:
    """What the measures of an Analysis were made on.

    `families`: which were (`FAMILY`); `cached`: which of them were read from `cache` (None: no cache);
    `data`, `task`: by name, for the reader; `notes`: what he should know of the cache.
    """

    samples: int
    seed: int
    data: str
    task: str
    families: tuple[str, ...]
    cached: tuple[str, ...] = ()
    cache: str | None = None
    notes: tuple[Diagnostic, ...] = ()
