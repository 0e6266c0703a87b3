"""Samplers of denoising diffusion: respaced ancestral sampling (DDPM) and DDIM, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import primary
from .schedule import Schedule


@dataclass(frozen=True)
class Denoiser:
    """Calls a model for its noise and variance, guided or not; guided, both halves go in one doubled batch."""

    model: Callable[..., Any]
    channels: int
    learned_variance: bool
    x_name: str
    t_name: str
    label_name: str | None
    null_label: int
    guided_channels: int | None

    def __call__(
        self, x: Tensor, t: int, labels: Tensor | None, guidance: float
    ) -> tuple[Tensor, Tensor | None]:
        """Noise [B, C, …] and the variance's fraction [B, C, …], or None where the variance is fixed."""
        guided = guidance != 1.0 and labels is not None
        inputs = {self.x_name: torch.cat([x, x]) if guided else x}
        inputs[self.t_name] = torch.full(
            (len(inputs[self.x_name]),), t, dtype=torch.int64, device=x.device
        )
        if self.label_name is not None:
            null = torch.full((len(x),), self.null_label, dtype=torch.int64, device=x.device)
            inputs[self.label_name] = (
                torch.cat([labels, null])
                if guided and labels is not None
                else null
                if labels is None
                else labels
            )
        output = primary(self.model(**inputs)).float()
        if guided:
            output, free = output.chunk(2)
            k = self.channels if self.guided_channels is None else self.guided_channels
            output = torch.cat(
                [free[:, :k] + guidance * (output[:, :k] - free[:, :k]), output[:, k:]], dim=1
            )
        return output[:, : self.channels], output[
            :, self.channels :
        ] if self.learned_variance else None


def draw(
    denoiser: Denoiser,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    count: int,
    generator: torch.Generator,
    clip: bool,
    steps: int = 50,
    method: Literal["ddim", "ddpm"] = "ddim",
    eta: float = 0.0,
    guidance: float = 1.0,
    labels: Tensor | int | None = None,
    noise: Tensor | None = None,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Run `steps` of the schedule from noise to `count` samples [count, *shape], float32, on `device`.

    All noise is drawn for the whole count before it is cut into batches, so the result does not depend on `batch`.
    Sources: DDPM, Ho et al. 2020, alg. 2; DDIM, Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16; guidance as in DiT.
    """
    if method not in ("ddim", "ddpm"):
        raise ValueError(f"unknown sampling method {method!r}: choose ddim or ddpm")
    if labels is not None and denoiser.label_name is None:
        raise ValueError("labels were given, but the task is unconditional (label_name is None)")
    if isinstance(labels, int):
        labels = torch.full((count,), labels, dtype=torch.int64)
    if labels is not None and len(labels) != count:
        raise ValueError(f"{count} samples need {count} labels, not {len(labels)}")
    spaced = schedule.respaced(steps)
    x = (torch.randn(count, *shape, generator=generator) if noise is None else noise.float()).to(
        device
    )
    labels = None if labels is None else labels.to(device)
    random = method == "ddpm" or eta > 0
    size = batch or count
    with torch.inference_mode():
        for step in reversed(range(steps)):
            fresh = (
                torch.randn(count, *shape, generator=generator).to(device)
                if random and step > 0
                else None
            )
            parts: list[Tensor] = []
            for start in range(0, count, size):
                cut = slice(start, start + size)
                eps, fraction = denoiser(
                    x[cut],
                    int(spaced.timesteps[step]),
                    None if labels is None else labels[cut],
                    guidance,
                )
                kick = None if fresh is None else fresh[cut]
                if method == "ddim":
                    parts.append(_ddim(spaced, step, x[cut], eps, kick, eta, clip))
                else:
                    parts.append(_ddpm(spaced, step, x[cut], eps, fraction, kick, clip))
            x = torch.cat(parts)
    return x.clone()  # leave inference mode with an ordinary tensor


def _clean(schedule: Schedule, step: int, x: Tensor, eps: Tensor, clip: bool) -> Tensor:
    bar = float(schedule.alphas_cumprod[step])
    clean = (x - (1 - bar) ** 0.5 * eps) / bar**0.5
    return clean.clamp(-1, 1) if clip else clean


def _ddim(
    schedule: Schedule,
    step: int,
    x: Tensor,
    eps: Tensor,
    kick: Tensor | None,
    eta: float,
    clip: bool,
) -> Tensor:
    bar, before = float(schedule.alphas_cumprod[step]), float(schedule.alphas_cumprod_prev[step])
    clean = _clean(schedule, step, x, eps, clip)
    if clip:
        eps = (x - bar**0.5 * clean) / (1 - bar) ** 0.5
    sigma = eta * ((1 - before) / (1 - bar) * (1 - bar / before)) ** 0.5
    x = before**0.5 * clean + max(1 - before - sigma**2, 0.0) ** 0.5 * eps
    return x if kick is None else x + sigma * kick


def _ddpm(
    schedule: Schedule,
    step: int,
    x: Tensor,
    eps: Tensor,
    fraction: Tensor | None,
    kick: Tensor | None,
    clip: bool,
) -> Tensor:
    of_clean, of_noisy = (float(table[step]) for table in schedule.posterior_coefficients)
    mean = of_clean * _clean(schedule, step, x, eps, clip) + of_noisy * x
    if kick is None:
        return mean
    low, high = float(schedule.posterior_log_variance[step]), float(schedule.betas[step].log())
    if fraction is None:
        return mean + torch.tensor(low / 2).exp().to(x.device) * kick
    return mean + ((low + (fraction + 1) / 2 * (high - low)) / 2).exp() * kick
