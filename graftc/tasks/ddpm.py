"""Denoising diffusion with noise prediction, learned variance and label dropout: what DiT is trained for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Prepared, entry, per_sample, primary
from .noise import rand, randint, randn
from .sampler import Denoiser, draw
from .schedule import Kind, Schedule


@dataclass(frozen=True)
class DDPM:
    """Predict the noise in x_t (Ho et al. 2020), and the variance of each step (Nichol & Dhariwal 2021, eq. 14-16).

    A raw sample holds `latent_key` [B, C, …] and, for a conditional model, `label_key` [B] int64. The model is called with the
    keyword arguments `x_name` [B, C, …], `t_name` [B] int64 and `label_name` [B] int64, and returns [B, 2C, …], or [B, C, …] when
    `learned_variance` is off. Defaults are those of facebookresearch/DiT, whose forward is (x, t, y); for diffusers set
    `x_name="hidden_states", t_name="timestep", label_name="class_labels"`. `label_name=None` makes the task unconditional.

    `shape` is one latent's shape, needed only to sample. `levels` is the number of grey levels in [-1, 1], for the likelihood of
    step 0. `guided_channels` limits guidance to the first channels (DiT's released sampler: 3 of 4); None guides all. `clip` holds
    the predicted image in [-1, 1] while sampling: right for pixels, wrong for latents of an autoencoder, so off as in DiT.

    >>> task = DDPM(shape=(4, 32, 32))
    >>> batch = {"latent": torch.zeros(2, 4, 32, 32), "label": torch.tensor([7, 8])}
    >>> prepared = task.prepare(batch, torch.Generator().manual_seed(0))
    >>> sorted(prepared.inputs), prepared.inputs["t"].shape
    (['t', 'x', 'y'], torch.Size([2]))
    >>> task.loss(torch.zeros(2, 8, 32, 32), prepared).shape
    torch.Size([])
    """

    shape: tuple[int, ...] = ()
    schedule: Kind = "linear"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    learned_variance: bool = True
    null_label: int = 1000
    label_dropout: float = 0.1
    levels: int = 256
    clip: bool = False
    guided_channels: int | None = None
    x_name: str = "x"
    t_name: str = "t"
    label_name: str | None = "y"
    latent_key: str = "latent"
    label_key: str = "label"

    @property
    def noise(self) -> Schedule:
        """The noise schedule, built once and cached."""
        return Schedule.build(self.schedule, self.steps, self.beta_start, self.beta_end)

    @property
    def time_range(self) -> tuple[float, float]:
        """Where `t` lies: errors are told by bins of it."""
        return 0.0, float(self.steps)

    def prepare(self, sample: Mapping[str, Tensor], generator: torch.Generator) -> Prepared:
        """Draw a timestep and noise for each latent, and drop labels; targets are noise, x_start, x_t and t.

        Source: eq. 4 of Ho et al.; paper 2506.05340, eq. 2, which distils on these noised inputs.
        """
        clean = entry(sample, self.latent_key, "ddpm")
        count, device = clean.shape[0], clean.device
        t = randint(self.steps, (count,), generator).to(device)
        noise = randn(clean.shape, generator).to(device=device, dtype=clean.dtype)
        noisy = self.diffuse(clean, noise, t)
        inputs = {self.x_name: noisy, self.t_name: t}
        if self.label_name is not None:
            label = entry(sample, self.label_key, "ddpm")
            dropped = rand((count,), generator).to(device) < self.label_dropout
            inputs[self.label_name] = torch.where(
                dropped, torch.full_like(label, self.null_label), label
            )
        return Prepared(inputs, {"noise": noise, "x_start": clean, "x_t": noisy, "t": t})

    def diffuse(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of q(x_t | x_0): `clean` and `noise` [B, …], `t` [B]."""
        bar = self.noise.alphas_cumprod.to(t.device)[t]
        return per_sample(bar.sqrt(), clean) * clean + per_sample((1 - bar).sqrt(), clean) * noise

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        """Mean squared error of the noise, plus the variational bound in bits for the variance (times steps / 1000).

        The bound's gradient stops at the predicted noise, so it trains the variance alone (Nichol & Dhariwal, sec. 3.1).
        """
        mse, bound = self._terms(outputs, prepared)
        return mse if bound is None else mse + bound

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        """`mse`, and `vb` in bits a dimension when the variance is learned."""
        mse, bound = self._terms(outputs, prepared)
        return {"mse": mse.item()} if bound is None else {"mse": mse.item(), "vb": bound.item()}

    def sample(
        self, model: Callable[..., Any], *, count: int, generator: torch.Generator, **options: Any
    ) -> Tensor:
        """Draw `count` latents [count, *shape].

        Options: `steps` (default 50), `method` "ddim" or "ddpm", `eta` (ddim, 0), `guidance` (1.0 is none), `labels` [count] or
        an int (default: no label), `noise` [count, *shape] to start from, `batch`, `device`.
        """
        if not self.shape:
            raise ValueError("DDPM needs `shape`, the shape of one latent, to sample")
        denoiser = Denoiser(
            model,
            channels=self.shape[0],
            learned_variance=self.learned_variance,
            x_name=self.x_name,
            t_name=self.t_name,
            label_name=self.label_name,
            null_label=self.null_label,
            guided_channels=self.guided_channels,
        )
        return draw(
            denoiser,
            self.noise,
            self.shape,
            count=count,
            generator=generator,
            clip=self.clip,
            **options,
        )

    def _terms(self, outputs: Any, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        output, targets = primary(outputs), prepared.targets
        noise, channels = targets["noise"], targets["noise"].shape[1]
        wanted = channels * (2 if self.learned_variance else 1)
        if output.shape[1] != wanted:
            with_variance = "with" if self.learned_variance else "without"
            raise ValueError(
                f"ddpm {with_variance} learned variance on {channels} channels needs {wanted} out, the model gave {output.shape[1]}"
            )
        predicted = output[:, :channels].float()
        mse = (predicted - noise.float()).square().mean()
        if not self.learned_variance:
            return mse, None
        bound = self._bound(predicted.detach(), output[:, channels:].float(), targets)
        return mse, bound * (self.steps / 1000)

    def _bound(self, predicted: Tensor, fraction: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Mean over the batch of KL(q(x_{t-1} | x_t, x_0) || p), or -log p(x_0 | x_1) at step 0, in bits a dimension."""
        x_t, clean, t = targets["x_t"].float(), targets["x_start"].float(), targets["t"]
        noise = self.noise

        def at(table: Tensor) -> Tensor:
            return per_sample(table.to(t.device)[t], x_t)

        bar = noise.alphas_cumprod
        of_clean, of_noisy = (at(table) for table in noise.posterior_coefficients)
        guess = at(bar.rsqrt()) * x_t - at((1 / bar - 1).sqrt()) * predicted
        true_mean, mean = of_clean * clean + of_noisy * x_t, of_clean * guess + of_noisy * x_t
        low, high = at(noise.posterior_log_variance), at(noise.betas.log())
        log_variance = low + (fraction + 1) / 2 * (high - low)
        kl = 0.5 * (
            log_variance
            - low
            - 1
            + (low - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        nll = -discretized_log_likelihood(clean, mean, 0.5 * log_variance, self.levels)
        bits = torch.where(per_sample(t, x_t) == 0, nll, kl) / math.log(2)
        return bits.mean()


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Log probability, elementwise in nats, of the grey level of `x` under a Gaussian cut into `levels` bins over [-1, 1].

    The outermost bins reach to infinity. Source: Ho et al. 2020, sec. 3.3.

    >>> edge = torch.tensor([-1.0, 1.0])
    >>> discretized_log_likelihood(edge, edge, torch.tensor(-6.0), 17).abs().max().item() < 1e-6
    True
    """
    half = 1 / (levels - 1)
    inverse = (-log_scale).exp()
    upper, lower = normal_cdf((x - mean + half) * inverse), normal_cdf((x - mean - half) * inverse)
    log_upper, log_above = upper.clamp_min(1e-12).log(), (1 - lower).clamp_min(1e-12).log()
    inner = (upper - lower).clamp_min(1e-12).log()
    return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_above, inner))


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function, elementwise."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
