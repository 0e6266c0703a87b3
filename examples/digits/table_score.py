"""Scoring a row of the digits table: every model from the same noise and labels, and the samples kept for the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from classifier import accuracy, classifier
from data import CLASSES
from frechet import features, frechet_distance, generate, real_features
from torch import Tensor


@dataclass(frozen=True)
class Protocol:
    """How rows are scored. Unguided: guidance narrows variety, and at 1.5 the distance sees little else."""

    samples: int
    seeds: tuple[int, ...]
    steps: int = 15
    guidance: float = 1.0
    method: str = "ddim"
    batch: int = 100

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)} ({', '.join(map(str, self.seeds))})"
        guidance = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}"
        return (
            f"{self.samples:,} samples x {seeds}, {self.method.upper()} {self.steps} steps, {guidance}, labels 0 to 9 in turn, "
            "the same noise and labels for every row, against all 1,797 real digits in the 32 features of classifier.py"
        )


@dataclass(frozen=True)
class Drawn:
    """One model and one seed: the Fréchet distance, and the share of samples that the classifier reads as the label asked for.

    `same_size` is the distance of the first samples to a random half of the real digits, 898 against 899 as in
    `real_against_real` (fewer where fewer are drawn): the only figure that may be held against that one.
    """

    distance: float
    same_size: float
    read_as_asked: float
    images: Tensor


def score_seed(
    model: Callable[..., Any], task: Any, protocol: Protocol, seed: int, *, keep: int = 20
) -> Drawn:
    """Draw the samples of one seed and measure them; the first `keep` are kept for the picture."""
    drawn = generate(
        model, task, samples=protocol.samples, seed=seed, steps=protocol.steps, guidance=protocol.guidance,
        batch=protocol.batch, method=protocol.method,
    )  # fmt: skip
    found, everything = features(drawn), real_features("all")
    half = len(everything) // 2
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(protocol.samples) % CLASSES
    return Drawn(
        distance=frechet_distance(found, everything),
        same_size=frechet_distance(found[:half], everything[order[half:]]),
        read_as_asked=accuracy(classifier(), {"latent": drawn.clamp(-1, 1), "label": labels}),
        images=drawn[:keep].clone(),
    )
