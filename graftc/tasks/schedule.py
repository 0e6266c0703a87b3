"""Noise schedules of denoising diffusion: betas, the quantities that follow from them, and respacing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "cosine", "scaled_linear"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusion schedule of T steps; every table is [T], float64, on the CPU.

    `timesteps` are the steps of the original schedule that the model is asked for: 0..T-1 unless respaced.
    Source: Ho et al. 2020, eq. 4-7; Nichol & Dhariwal 2021 (arXiv 2102.09672), sec. 3.
    """

    betas: Tensor
    timesteps: Tensor

    @classmethod
    def build(cls, kind: Kind, steps: int, beta_start: float, beta_end: float) -> Schedule:
        """The schedule `kind` of `steps` steps. `scaled_linear` is linear in the square root of beta (latent diffusion)."""
        return _build(kind, steps, beta_start, beta_end)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Signal power left after each step."""
        return torch.cumprod(1 - self.betas, 0)

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        """Signal power before each step; 1 before step 0."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at step 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm, with step 0 given the value of step 1, since log 0 has none."""
        variance = self.posterior_variance
        return (
            torch.cat([variance[1:2], variance[1:]]).log()
            if len(variance) > 1
            else variance.clamp_min(1e-20).log()
        )

    @property
    def posterior_coefficients(self) -> tuple[Tensor, Tensor]:
        """(a, b) such that the mean of q(x_{t-1} | x_t, x_0) is a x_0 + b x_t."""
        bar, before = self.alphas_cumprod, self.alphas_cumprod_prev
        return self.betas * before.sqrt() / (1 - bar), (1 - before) * (1 - self.betas).sqrt() / (
            1 - bar
        )

    def respaced(self, steps: int) -> Schedule:
        """The schedule that visits only `steps` of these steps, evenly spread, the first and the last among them.

        >>> Schedule.build("linear", 1000, 1e-4, 0.02).respaced(5).timesteps.tolist()
        [0, 250, 500, 749, 999]
        """
        total = len(self.betas)
        if not 1 <= steps <= total:
            raise ValueError(
                f"a schedule of {total} steps cannot be sampled in {steps}: choose 1 to {total}"
            )
        keep = (
            [round(i * (total - 1) / max(steps - 1, 1)) for i in range(steps)]
            if steps > 1
            else [total - 1]
        )
        bar = self.alphas_cumprod[keep]
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        return Schedule(betas=1 - bar / before, timesteps=self.timesteps[keep])


@cache
def _build(kind: Kind, steps: int, beta_start: float, beta_end: float) -> Schedule:
    if kind == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "cosine":
        edge = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown noise schedule {kind!r}: choose linear, cosine or scaled_linear")
    return Schedule(betas=betas, timesteps=torch.arange(steps))
