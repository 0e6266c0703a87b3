"""Moments of activations and the angle between two streams, summed up batch by batch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.program.measured import Statistics

_CHUNK = 1 << 20
"""Elements that are in float64 at once."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sums of the 2nd to 4th powers of the distance from it; mergeable.

    Source: Pébay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments" (2008): no cancellation, whatever the mean.

    >>> x = torch.arange(8.0)
    >>> (Moments.of(x[:3]) + Moments.of(x[3:])).statistics() == Moments.of(x).statistics()
    True
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    absmax: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of all elements of a tensor."""
        found = cls()
        for part in values.detach().flatten().split(_CHUNK):
            x = part.double()
            mean = x.mean()
            centred = x - mean
            square = centred.square()
            powers = (square.sum(), (square * centred).sum(), square.square().sum())
            sums = torch.stack([mean, *powers, x.abs().max()]).tolist()
            found = found + cls(x.numel(), *sums)
        return found

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        a, b, n = self.count, other.count, self.count + other.count
        d = other.mean - self.mean
        m2 = self.m2 + other.m2 + d * d * a * b / n
        m3 = (
            self.m3
            + other.m3
            + d**3 * a * b * (a - b) / n**2
            + 3 * d * (a * other.m2 - b * self.m2) / n
        )
        m4 = (
            self.m4
            + other.m4
            + d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d * d * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * d * (a * other.m3 - b * self.m3) / n
        )
        return Moments(
            n, self.mean + d * b / n, m2, m3, m4, _greatest(self.absmax, other.absmax)
        )  # fmt: skip

    def statistics(self) -> Statistics:
        """Mean, standard deviation (over n), largest absolute value, kurtosis."""
        variance = self.m2 / self.count
        # What rounding leaves of a constant is no spread.
        flat = variance <= (1e-12 * self.absmax) ** 2
        kurtosis = None if flat else self.m4 / self.count / variance**2
        return Statistics(self.mean, 0.0 if flat else variance**0.5, self.absmax, kurtosis)


def _greatest(one: float, other: float) -> float:
    """The larger; not a number where either is none (`max` would lose it)."""
    return one if one >= other or one != one else other


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """The sum of the cosine similarity of each token's vectors [..., d], and how many tokens: [2] float64.

    A token whose vector is zero on one side has similarity 0; on both sides it has not changed: 1.

    >>> cosines(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0]])).tolist()
    [1.0, 2.0]
    """
    width = before.shape[-1]
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    one, other = before.detach().reshape(-1, width), after.detach().reshape(-1, width)
    rows = max(1, _CHUNK // max(width, 1))
    for a, b in zip(one.split(rows), other.split(rows), strict=True):
        x, y = a.double(), b.double()
        lengths = x.norm(dim=-1), y.norm(dim=-1)
        both = (lengths[0] == 0) & (lengths[1] == 0)
        product = lengths[0] * lengths[1]
        cosine = (x * y).sum(-1) / torch.where(product == 0, torch.ones_like(product), product)
        total += torch.where(both, torch.ones_like(cosine), cosine).sum()
    return torch.stack([total, total.new_tensor(float(len(one)))])
