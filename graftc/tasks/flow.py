"""Rectified flow: straight paths from noise to data (Liu et al. 2022, arXiv 2209.03003; SD3, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Prepared, entry, per_sample, primary
from .noise import rand, randn


@dataclass(frozen=True)
class RectifiedFlow:
    """Predict the velocity noise - x_0 on x_t = (1 - t) x_0 + t noise, t in (0, 1).

    A raw sample holds `latent_key` [B, …] and whatever else the model takes: every key of `conditions` (data key -> forward name)
    passes through unchanged, text embeddings for instance. The model gets `t_name` [B] float32, multiplied by `t_scale` (1000 for
    diffusers' SD3 and Flux heads that count so). `t_sampling` "logit_normal" puts more weight on the middle of the path (SD3,
    sec. 3.1); `shift` moves time towards noise for larger images (SD3, eq. 23). With `label_key`, labels are dropped to
    `null_label` and guidance works as in DDPM.

    >>> task = RectifiedFlow(shape=(4,), label_key=None)
    >>> prepared = task.prepare({"latent": torch.zeros(3, 4)}, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(prepared.inputs["x"], prepared.inputs["t"][:, None] * prepared.targets["noise"]))
    True
    """

    shape: tuple[int, ...] = ()
    t_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    t_scale: float = 1.0
    shift: float = 1.0
    null_label: int = 1000
    label_dropout: float = 0.1
    x_name: str = "x"
    t_name: str = "t"
    label_name: str = "y"
    latent_key: str = "latent"
    label_key: str | None = "label"
    conditions: tuple[tuple[str, str], ...] = ()

    @property
    def time_range(self) -> tuple[float, float]:
        """Where `t` lies: errors are told by bins of it."""
        return 0.0, 1.0

    def prepare(self, sample: Mapping[str, Tensor], generator: torch.Generator) -> Prepared:
        """Draw a time and noise for each latent; targets are noise, x_start, x_t, t (unscaled) and velocity."""
        clean = entry(sample, self.latent_key, "rectified_flow")
        count, device = clean.shape[0], clean.device
        if self.t_sampling == "logit_normal":
            t = randn((count,), generator).sigmoid()
        elif self.t_sampling == "uniform":
            t = rand((count,), generator)
        else:
            raise ValueError(
                f"unknown t_sampling {self.t_sampling!r}: choose logit_normal or uniform"
            )
        t = self._shifted(t).to(device)
        noise = randn(clean.shape, generator).to(device=device, dtype=clean.dtype)
        mix = per_sample(t, clean)
        noisy = (1 - mix) * clean + mix * noise
        inputs = {self.x_name: noisy, self.t_name: t * self.t_scale}
        if self.label_key is not None:
            label = entry(sample, self.label_key, "rectified_flow")
            dropped = rand((count,), generator).to(device) < self.label_dropout
            inputs[self.label_name] = torch.where(
                dropped, torch.full_like(label, self.null_label), label
            )
        for key, name in self.conditions:
            inputs[name] = entry(sample, key, "rectified_flow")
        return Prepared(
            inputs,
            {"noise": noise, "x_start": clean, "x_t": noisy, "t": t, "velocity": noise - clean},
        )

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        """Mean squared error of the velocity."""
        velocity = prepared.targets["velocity"]
        output = primary(outputs)
        if output.shape != velocity.shape:
            raise ValueError(
                f"rectified_flow wants a velocity of shape {tuple(velocity.shape)}, the model gave {tuple(output.shape)}"
            )
        return (output.float() - velocity.float()).square().mean()

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        """`mse` of the velocity."""
        return {"mse": self.loss(outputs, prepared).item()}

    def sample(
        self, model: Callable[..., Any], *, count: int, generator: torch.Generator, **options: Any
    ) -> Tensor:
        """Integrate the flow from noise to `count` latents [count, *shape] by Euler steps.

        Options: `steps` (default 28), `guidance` (1.0 is none), `labels` [count] or an int, `conditions`, a mapping of forward
        names to tensors [count, …], `noise` [count, *shape], `batch`, `device`.
        """
        if not self.shape:
            raise ValueError("RectifiedFlow needs `shape`, the shape of one latent, to sample")
        return self._euler(model, count, generator, **options)

    def _euler(
        self,
        model: Callable[..., Any],
        count: int,
        generator: torch.Generator,
        *,
        steps: int = 28,
        guidance: float = 1.0,
        labels: Tensor | int | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
        batch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        start = (
            torch.randn(count, *self.shape, generator=generator) if noise is None else noise.float()
        ).to(device)
        if isinstance(labels, int):
            labels = torch.full((count,), labels, dtype=torch.int64)
        if labels is None:
            labels, guidance = torch.full((count,), self.null_label, dtype=torch.int64), 1.0
        labels = labels.to(device)
        extra = {name: value.to(device) for name, value in (conditions or {}).items()}
        times = [
            float(time)
            for time in self._shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        ]
        size, done = batch or count, list[Tensor]()
        with torch.inference_mode():
            for first in range(0, count, size):
                cut = slice(first, first + size)
                x, given = start[cut], {name: value[cut] for name, value in extra.items()}
                for now, then in pairwise(times):
                    x = x + (then - now) * self._velocity(
                        model, x, now, labels[cut], given, guidance
                    )
                done.append(x)
        return torch.cat(done).clone()

    def _velocity(
        self,
        model: Callable[..., Any],
        x: Tensor,
        now: float,
        labels: Tensor,
        given: Mapping[str, Tensor],
        guidance: float,
    ) -> Tensor:
        guided = guidance != 1.0 and self.label_key is not None
        inputs = {
            name: torch.cat([value, value]) if guided else value for name, value in given.items()
        }
        inputs[self.x_name] = torch.cat([x, x]) if guided else x
        inputs[self.t_name] = torch.full(
            (len(inputs[self.x_name]),), now * self.t_scale, device=x.device
        )
        if self.label_key is not None:
            inputs[self.label_name] = (
                torch.cat([labels, torch.full_like(labels, self.null_label)]) if guided else labels
            )
        output = primary(model(**inputs)).float()
        if not guided:
            return output
        with_label, without = output.chunk(2)
        return without + guidance * (with_label - without)

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)
