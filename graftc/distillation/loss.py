"""Regression losses of a site, normalised so that predicting zero costs 1.

Source of the choice of losses: arXiv 2506.05340, Tab. 1 (L1 for attention, L2 for MLP), because L2
over-weights the outliers of heavy-tailed activations. `auto` tells the tails by their kurtosis.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gamma
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graftc.distillation.targets import Loss


@dataclass(frozen=True)
class Scale:
    """What a site's target measures over the held-out samples: mean |t|, and mean t².

    `limit`: entries above it in magnitude are left out, here and in the loss. `kurtosis`: the fourth
    central moment over the second squared, of all entries: 3 for a Gaussian, 6 for a Laplacian.
    """

    absolute: float
    energy: float
    limit: float | None = None
    kurtosis: float | None = None


def kurtosis_of(shape: float) -> float:
    """The kurtosis of the generalised normal density ∝ exp(-|x|^shape).

    >>> kurtosis_of(2), kurtosis_of(1)
    (3.0, 6.0)
    """
    return round(gamma(5 / shape) * gamma(1 / shape) / gamma(3 / shape) ** 2, 9)


def chosen(loss: Loss, scale: Scale) -> Literal["l1", "l2", "huber"]:
    """The kind of a site's loss; `auto` takes the one that suits the tails of the target.

    Rule: the l_p loss is the negative log-likelihood of a generalised normal of shape p, whose
    kurtosis is Γ(5/p) Γ(1/p) / Γ(3/p)² (Box & Tiao, Bayesian Inference in Statistical Analysis, 1973,
    sec. 3.2). The shape with the measured kurtosis decides: from 7/4 up (kurtosis at most 3.30) it is l2,
    up to 5/4 (at least 4.53) it is l1, and between them huber. The target stands for the residual,
    which is not known before training.

    >>> tails = [Scale(1.0, 1.0, kurtosis=k) for k in (2.5, 4.0, 12.0)]
    >>> [chosen(Loss("auto"), scale) for scale in tails]
    ['l2', 'huber', 'l1']
    """
    if loss.kind != "auto":
        return loss.kind
    if scale.kurtosis is None or scale.kurtosis <= kurtosis_of(7 / 4):
        return "l2"
    return "l1" if scale.kurtosis >= kurtosis_of(5 / 4) else "huber"


def regression(student: Tensor, target: Tensor, loss: Loss, scale: Scale) -> Tensor:
    """The site's loss, a scalar, without its weight, over the entries that the scale's limit keeps.

    Normalised, both tensors are measured in the target's root mean square, and the result is
    divided by what a prediction of zero would cost; `delta` of Huber is then in that unit.

    >>> t = torch.tensor([3.0, -1.0])
    >>> scale = Scale(absolute=2.0, energy=5.0)
    >>> [round(regression(torch.zeros(2), t, Loss(kind), scale).item(), 4) for kind in ("l1", "l2")]
    [1.0, 1.0]
    """
    student, target = wide(student), wide(target)
    kind, whole = chosen(loss, scale), 1.0
    if scale.limit is not None:
        kept = target.abs() <= scale.limit
        # An entry that is left out costs nothing, and the mean is over those that are kept.
        student, target = torch.where(kept, student, 0.0), torch.where(kept, target, 0.0)
        whole = kept.numel() / kept.sum().clamp(min=1)
    if kind == "l1":
        value = F.l1_loss(student, target) * whole
        return value / scale.absolute if loss.normalise else value
    if kind == "l2":
        value = F.mse_loss(student, target) * whole
        return value / scale.energy if loss.normalise else value
    if not loss.normalise:
        return F.huber_loss(student, target, delta=loss.delta) * whole
    root = scale.energy**0.5
    value = F.huber_loss(student / root, target / root, delta=loss.delta) * whole
    return value / _huber_of_zero(scale, loss.delta)


def _huber_of_zero(scale: Scale, delta: float) -> float:
    """The cost of predicting zero, had every target the same magnitude (its mean, in rms units)."""
    mean = scale.absolute / scale.energy**0.5
    return 0.5 * mean**2 if mean <= delta else delta * (mean - 0.5 * delta)


class Moments:
    """Sums over batches of a target's entries, in float64, for its `Scale`."""

    def __init__(self) -> None:
        self.count = 0
        self.absolute = 0.0
        self.powers = [0.0, 0.0, 0.0, 0.0]

    def add(self, target: Tensor, limit: float | None = None) -> None:
        """Take in a batch's entries, those within `limit`."""
        exact = target.double()
        if limit is not None:
            exact = exact[exact.abs() <= limit]
        self.count += exact.numel()
        self.absolute += float(exact.abs().sum())
        power = exact
        for i in range(4):
            self.powers[i] += float(power.sum())
            power = power * exact

    def sums(self) -> list[float]:
        """As numbers that add up over processes."""
        return [float(self.count), self.absolute, *self.powers]

    @staticmethod
    def of(sums: list[float]) -> Moments:
        """What `sums` gave."""
        made = Moments()
        made.count, made.absolute, made.powers = int(sums[0]), sums[1], list(sums[2:])
        return made

    def scale(self, limit: float | None = None) -> Scale:
        """
        >>> moments = Moments()
        >>> moments.add(torch.tensor([1.0, -1.0, 3.0, -3.0]))
        >>> moments.scale()
        Scale(absolute=2.0, energy=5.0, limit=None, kurtosis=1.64)
        """
        mean, second, third, fourth = (p / self.count for p in self.powers)
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        kurtosis = central / variance**2 if variance > 0 else None
        return Scale(self.absolute / self.count, second, limit, kurtosis)


def squared_error(student: Tensor, target: Tensor) -> tuple[float, float, float, int]:
    """Sums over a batch: (error², target², |target|, count), in float64."""
    exact = target.double()
    error = student.double() - exact
    return (
        float(error.square().sum()),
        float(exact.square().sum()),
        float(exact.abs().sum()),
        exact.numel(),
    )


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def counted(target: Tensor, scale: Scale) -> Tensor | int:
    """How many entries of a target the mean of its loss is over."""
    return target.numel() if scale.limit is None else (target.abs() <= scale.limit).sum()


CONSTANT = 1e-10
"""Up to which share of its energy a target's change from sample to sample is rounding."""


def change_from(first: Tensor, target: Tensor) -> float:
    """‖t − first‖² summed over a batch, in float64: 0 where each sample has the same target.

    >>> change_from(torch.ones(2), torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    4.0
    """
    return float((target.double() - first.double()).square().sum())


def same_for_all(target: Tensor) -> bool:
    """Whether a batch of targets is one target, but for rounding: nothing that an operator would have to see.

    >>> same_for_all(torch.tensor([[1.0, 2.0], [1.0, 2.0]])), same_for_all(torch.eye(2))
    (True, False)
    """
    return change_from(target[0], target) <= CONSTANT * float(target.double().square().sum())


def finite(*values: Tensor) -> bool:
    """Whether every entry is a number."""
    return all(bool(torch.isfinite(v).all()) for v in values)
