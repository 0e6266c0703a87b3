"""Regression losses of a site, normalised so that predicting zero costs 1.

Source of the choice of losses: arXiv 2506.05340, Tab. 1 (L1 for attention, L2 for MLP).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftc.distillation.targets import Loss


@dataclass(frozen=True)
class Scale:
    """What a site's target measures over the held-out samples: mean |t|, and mean t²."""

    absolute: float
    energy: float


def regression(student: Tensor, target: Tensor, loss: Loss, scale: Scale) -> Tensor:
    """The site's loss, a scalar, without its weight.

    Normalised, both tensors are measured in the target's root mean square, and the result is
    divided by what a prediction of zero would cost; `delta` of Huber is then in that unit.

    >>> t = torch.tensor([3.0, -1.0])
    >>> scale = Scale(absolute=2.0, energy=5.0)
    >>> [round(regression(torch.zeros(2), t, Loss(kind), scale).item(), 4) for kind in ("l1", "l2")]
    [1.0, 1.0]
    """
    student, target = student.float(), target.float()
    if loss.kind == "l1":
        value = F.l1_loss(student, target)
        return value / scale.absolute if loss.normalise else value
    if loss.kind == "l2":
        value = F.mse_loss(student, target)
        return value / scale.energy if loss.normalise else value
    if not loss.normalise:
        return F.huber_loss(student, target, delta=loss.delta)
    root = scale.energy**0.5
    value = F.huber_loss(student / root, target / root, delta=loss.delta)
    return value / _huber_of_zero(scale, loss.delta)


def _huber_of_zero(scale: Scale, delta: float) -> float:
    """The cost of predicting zero, had every target the same magnitude (its mean, in rms units)."""
    mean = scale.absolute / scale.energy**0.5
    return 0.5 * mean**2 if mean <= delta else delta * (mean - 0.5 * delta)


def squared_error(student: Tensor, target: Tensor) -> tuple[float, float, float, int]:
    """Sums over a batch: (error², target², |target|, count), in float64."""
    wide = target.double()
    error = student.double() - wide
    return (
        float(error.square().sum()),
        float(wide.square().sum()),
        float(wide.abs().sum()),
        wide.numel(),
    )


def finite(*values: Tensor) -> bool:
    """Whether every entry is a number."""
    return all(bool(torch.isfinite(v).all()) for v in values)
