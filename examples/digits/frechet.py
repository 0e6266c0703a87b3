"""Fréchet distance between generated and real digits, in the 32 features of `classifier.py`.

The distance of Heusel et al. 2017 (arXiv 1706.08500, eq. 6), in float64, with this classifier in the place of Inception: figures
compare models of this example with one another, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from classifier import Classifier, classifier
from data import CLASSES, Digits
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Fréchet distances, one a seed, and how they were got. `std` is the sample standard deviation over seeds (0 for one)."""

    values: tuple[float, ...]
    protocol: str

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        return (
            torch.tensor(self.values, dtype=torch.float64).std().item()
            if len(self.values) > 1
            else 0.0
        )

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}"


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to two sets of features, [N, F] and [M, F].

    tr sqrt(A B) is taken as tr sqrt(sqrt(A) B sqrt(A)), which is symmetric, so `eigh` serves and nothing complex appears.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> abs(frechet_distance(x, x)) < 1e-9, round(frechet_distance(x, x + 2), 6)
    (True, 16.0)
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = _sqrt(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    ).item()


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def score(
    model: Callable[..., Any],
    task: Any,
    *,
    samples: int,
    seeds: Sequence[int],
    steps: int = 15,
    guidance: float = 1.5,
    batch: int = 500,
    method: str = "ddim",
    device: torch.device | str = "cpu",
) -> Score:
    """Distance of `samples` guided samples to all 1,797 real digits, once a seed.

    A seed fixes the initial noise and the labels (0, 1, …, 9 in turn, as real digits are within 3 % of equally common), so every
    model scored with the same seeds starts from the same noise: rows of a table differ by the model alone.
    """
    values = [
        frechet_distance(
            features(
                generate(
                    model,
                    task,
                    samples=samples,
                    seed=seed,
                    steps=steps,
                    guidance=guidance,
                    batch=batch,
                    method=method,
                    device=device,
                )
            ),
            real_features("all"),
        )
        for seed in seeds
    ]
    protocol = f"{samples} samples x {len(seeds)} seeds, {method} {steps} steps, guidance {guidance:g}, against all 1797 digits"
    return Score(tuple(values), protocol)


def generate(
    model: Callable[..., Any],
    task: Any,
    *,
    samples: int,
    seed: int,
    steps: int = 15,
    guidance: float = 1.5,
    batch: int = 500,
    method: str = "ddim",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the samples [samples, 1, 8, 8] that `score` looks at, labels 0..9 in turn, on the CPU."""
    labels = torch.arange(samples) % CLASSES
    generator = torch.Generator().manual_seed(seed)
    return task.sample(
        model,
        count=samples,
        generator=generator,
        steps=steps,
        method=method,
        guidance=guidance,
        labels=labels,
        batch=batch,
        device=device,
    ).cpu()


def real_against_real(*, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> Score:
    """Distance between two disjoint random halves (898 and 899) of the real digits.

    A floor only roughly: the distance is biased upwards by both sets' size, and half sets are smaller than those of `score`.
    """
    everything = real_features("all")
    values: list[float] = []
    for seed in seeds:
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        half = len(order) // 2
        values.append(frechet_distance(everything[order[:half]], everything[order[half:]]))
    return Score(tuple(values), f"two disjoint halves of 1797 real digits x {len(seeds)} seeds")


def features(images: Tensor) -> Tensor:
    """The classifier's features [N, 32] of images [N, 1, 8, 8], clamped to [-1, 1]."""
    with torch.inference_mode():
        return torch.cat([_classifier().features(part.clamp(-1, 1)) for part in images.split(500)])


@cache
def real_features(part: str) -> Tensor:
    """Features of the real digits of one part of the data ("train", "held_out", "all")."""
    return features(Digits(part).batch()["latent"])  # pyright: ignore[reportArgumentType]


@cache
def _classifier() -> Classifier:
    return classifier()


def grid_png(
    rows: Mapping[str, Tensor],
    path: Path | str,
    *,
    columns: int = 20,
    beside: Mapping[str, str] | None = None,
    title: str = "",
) -> None:
    """Draw one row of images a model: the same noise and label down each column, as ink on paper.

    `beside`: a few words at the right of a row, by its name. Needs matplotlib (`graftc[report]`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.42 * columns + 3.2, 0.44 * len(rows) + 0.5))
    axes = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"hspace": 0.12})[:, 0]
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        shown = [
            torch.nn.functional.pad(image[0], (1, 1), value=-1.0)
            for image in images[:columns].clamp(-1, 1)
        ]
        axis.imshow(
            torch.cat(shown, dim=1), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest"
        )
        axis.text(-0.012, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
        words = (beside or {}).get(name, "")
        axis.text(1.012, 0.5, words, transform=axis.transAxes, ha="left", va="center", fontsize=9)
        axis.set_axis_off()
    if title:
        axes[0].set_title(title, fontsize=9, loc="left", pad=8)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
