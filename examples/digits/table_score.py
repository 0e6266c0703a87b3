"""Scoring a row of the digits table: every model from the same noise and labels, and the samples kept for the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from classifier import accuracy, classifier
from frechet import Score, features, frechet_distance, generate, real_features
from torch import Tensor, nn
from train import held_out_loss


@dataclass(frozen=True)
class Protocol:
    """How rows are scored. Unguided: guidance narrows variety, and at 1.5 the distance sees little else."""

    samples: int
    seeds: tuple[int, ...]
    steps: int = 15
    guidance: float = 1.0
    method: str = "ddim"
    batch: int = 500

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)} ({', '.join(map(str, self.seeds))})"
        guidance = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}"
        return (
            f"{self.samples:,} samples x {seeds}, {self.method.upper()} {self.steps} steps, {guidance}, labels 0 to 9 in turn, "
            "the same noise and labels for every row, against all 1,797 real digits in the 32 features of classifier.py"
        )


@dataclass(frozen=True)
class Scored:
    """What a row scored: Fréchet distance once a seed, the share of samples that the classifier reads as the label asked for,
    the task's loss on the 297 held-out digits; and the first samples of the first seed."""

    distance: Score
    read_as_asked: float
    held_out_loss: float
    images: Tensor
    same_size: Score


def score_model(model: nn.Module, task: Any, protocol: Protocol, *, keep: int = 20, done: Callable[[], None] = lambda: None) -> Scored:
    """Draw and score; `done` is called after each seed.

    `same_size`: the distance of the first samples to random halves of the real digits, 898 against 899 as in `real_against_real`
    (fewer where fewer are drawn), the only figure that may be held against that one.
    """
    values: list[float] = []
    small: list[float] = []
    right = 0.0
    images = torch.empty(0)
    everything = real_features("all")
    half = len(everything) // 2
    for seed in protocol.seeds:
        drawn = generate(
            model, task, samples=protocol.samples, seed=seed, steps=protocol.steps, guidance=protocol.guidance,
            batch=protocol.batch, method=protocol.method,
        )  # fmt: skip
        if not len(images):
            images = drawn[:keep].clone()
        found = features(drawn)
        values.append(frechet_distance(found, everything))
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        small.append(frechet_distance(found[:half], everything[order[half:]]))
        labels = torch.arange(protocol.samples) % 10
        right += accuracy(classifier(), {"latent": drawn.clamp(-1, 1), "label": labels}) / len(protocol.seeds)
        done()
    said = str(protocol)
    return Scored(Score(tuple(values), said), right, held_out_loss(model), images, Score(tuple(small), said))
