"""Denoising diffusion: schedules, the learned-variance loss and the samplers, against independent references."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.tasks import DDPM, Prepared
from graftc.tasks.ddpm import discretized_log_likelihood
from graftc.tasks.schedule import Schedule

SMALL = DDPM(shape=(1, 8, 8), null_label=10, levels=17)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(count: int) -> dict[str, Tensor]:
    grey = torch.randint(0, 17, (count, 1, 8, 8), generator=seeded(5))
    return {"latent": grey / 8 - 1, "label": torch.arange(count) % 10}


@pytest.mark.parametrize("kind", ["linear", "cosine", "scaled_linear"])
def test_a_schedule_destroys_the_signal_steadily(kind: Any):
    bar = Schedule.build(kind, 1000, 1e-4, 0.02).alphas_cumprod
    assert bar[0] > 0.999
    assert bar[-1] < 0.01
    assert (bar[1:] < bar[:-1]).all()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="choose linear, cosine or scaled_linear"):
        _ = DDPM(schedule="quadratic").noise  # type: ignore[arg-type]


def test_the_linear_schedule_is_that_of_ddpm():
    schedule = DDPM().noise
    assert schedule.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(4.035829e-05, rel=1e-6)


def test_respacing_keeps_the_noise_level_of_the_steps_it_visits():
    whole = DDPM().noise
    short = whole.respaced(15)
    assert torch.allclose(short.alphas_cumprod, whole.alphas_cumprod[short.timesteps], rtol=1e-12)
    assert torch.allclose(whole.respaced(1000).betas, whole.betas, rtol=1e-9)
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        whole.respaced(1001)


def test_noised_inputs_have_the_noise_of_their_timestep():
    task = DDPM(label_name=None)
    prepared = task.prepare({"latent": torch.full((4000, 1, 4, 4), 0.5)}, seeded())
    late = prepared.targets["t"] > 900
    assert prepared.inputs["x"][late].std().item() == pytest.approx(1.0, abs=0.02)
    assert set(prepared.inputs) == {"x", "t"}
    bar = task.noise.alphas_cumprod[prepared.targets["t"]].reshape(-1, 1, 1, 1)
    again = bar.sqrt() * 0.5 + (1 - bar).sqrt() * prepared.targets["noise"]
    assert torch.allclose(prepared.inputs["x"], again.float(), atol=1e-6)


def test_a_tenth_of_the_labels_is_dropped_and_the_rest_kept():
    batch = {"latent": torch.zeros(20000, 1, 1, 1), "label": torch.arange(20000) % 10}
    given = SMALL.prepare(batch, seeded()).inputs["y"]
    dropped = given == 10
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(given[~dropped], batch["label"][~dropped])


def test_input_names_can_be_those_of_diffusers():
    task = DDPM(x_name="hidden_states", t_name="timestep", label_name="class_labels")
    prepared = task.prepare(digits(3), seeded())
    assert set(prepared.inputs) == {"hidden_states", "timestep", "class_labels"}


def reference_loss(output: Tensor, prepared: Prepared, task: DDPM) -> float:
    """The learned-variance loss of improved-diffusion written out pixel by pixel, in Python floats."""
    betas = [
        task.beta_start + (task.beta_end - task.beta_start) * i / (task.steps - 1)
        for i in range(task.steps)
    ]
    bars = [math.prod(1 - b for b in betas[: i + 1]) for i in range(task.steps)]

    def variance(i: int) -> float:
        before = bars[i - 1] if i else 1.0
        return betas[i] * (1 - before) / (1 - bars[i])

    mse, bound, pixels = 0.0, 0.0, prepared.inputs["x"][0].numel()
    for b, t in enumerate(prepared.inputs["t"].tolist()):
        beta, bar, before = betas[t], bars[t], bars[t - 1] if t else 1.0
        low, high = math.log(variance(max(t, 1))), math.log(beta)
        rows = zip(
            prepared.targets["x_start"][b].double().flatten().tolist(),
            prepared.inputs["x"][b].double().flatten().tolist(),
            prepared.targets["noise"][b].double().flatten().tolist(),
            output[b, : output.shape[1] // 2].double().flatten().tolist(),
            output[b, output.shape[1] // 2 :].double().flatten().tolist(),
            strict=True,
        )
        for clean, noisy, noise, guess, v in rows:
            mse += (noise - guess) ** 2 / pixels
            log_var = (v + 1) / 2 * high + (1 - (v + 1) / 2) * low
            predicted = (noisy - math.sqrt(1 - bar) * guess) / math.sqrt(bar)
            of_clean, of_noisy = (
                beta * math.sqrt(before) / (1 - bar),
                (1 - before) * math.sqrt(1 - beta) / (1 - bar),
            )
            true_mean, mean = (
                of_clean * clean + of_noisy * noisy,
                of_clean * predicted + of_noisy * noisy,
            )
            if t > 0:
                nats = 0.5 * (
                    -1
                    + log_var
                    - low
                    + math.exp(low - log_var)
                    + (true_mean - mean) ** 2 / math.exp(log_var)
                )
            else:
                half, scale = 1 / (task.levels - 1), math.exp(0.5 * log_var)
                upper = (
                    1.0
                    if clean > 0.999
                    else 0.5 * (1 + math.erf((clean - mean + half) / scale / math.sqrt(2)))
                )
                lower = (
                    0.0
                    if clean < -0.999
                    else 0.5 * (1 + math.erf((clean - mean - half) / scale / math.sqrt(2)))
                )
                nats = -math.log(max(upper - lower, 1e-12))
            bound += nats / math.log(2) / pixels
    count = len(prepared.inputs["t"])
    return mse / count + bound / count * task.steps / 1000


@pytest.mark.parametrize("steps", [1000, 50])
def test_the_learned_variance_loss_agrees_with_a_float64_reference(steps: int):
    task = DDPM(null_label=10, levels=17, steps=steps)
    prepared = task.prepare(digits(8), seeded(3))
    t = torch.tensor([0, 0, 1, 2, steps // 3, steps // 2, steps - 2, steps - 1])
    noisy = task.diffuse(prepared.targets["x_start"], prepared.targets["noise"], t)
    prepared = Prepared({"x": noisy, "t": t}, prepared.targets | {"t": t, "x_t": noisy})
    near = prepared.targets["noise"] + 0.1 * torch.randn(8, 1, 8, 8, generator=seeded(4))
    output = torch.cat([near, torch.rand(8, 1, 8, 8, generator=seeded(6)) * 2 - 1], dim=1)
    assert task.loss(output, prepared).item() == pytest.approx(
        reference_loss(output, prepared, task), rel=2e-4
    )


def test_the_bound_trains_the_variance_alone():
    prepared = SMALL.prepare(digits(4), seeded())
    output = torch.zeros(4, 2, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(SMALL.loss(output, prepared), output)
    mse_only = -2 * prepared.targets["noise"] / prepared.targets["noise"].numel()
    assert torch.allclose(gradient[:, :1], mse_only, atol=1e-7)
    assert gradient[:, 1:].abs().max() > 0


def test_perfect_noise_has_no_error():
    task = DDPM(learned_variance=False)
    prepared = task.prepare(digits(4), seeded())
    assert task.metrics(prepared.targets["noise"], prepared) == {"mse": 0.0}


def test_a_model_with_the_wrong_channels_is_told_so():
    prepared = SMALL.prepare(digits(2), seeded())
    with pytest.raises(ValueError, match="needs 2 out, the model gave 1"):
        SMALL.loss(torch.zeros(2, 1, 8, 8), prepared)


def test_the_grey_levels_share_out_all_probability():
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64)
    for mean, log_scale in [(0.0, -1.0), (0.9, -2.0), (-1.3, 0.5)]:
        total = (
            discretized_log_likelihood(
                levels, torch.tensor(mean).double(), torch.tensor(log_scale).double(), 17
            )
            .exp()
            .sum()
        )
        assert total.item() == pytest.approx(1.0, abs=1e-6)


MEAN, SPREAD = 0.7, 0.4


def exact_denoiser(task: DDPM, fraction: float = -1.0):
    """The best possible noise prediction for data N(MEAN, SPREAD^2), from Bayes' rule; the label shifts the mean by a tenth."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> SimpleNamespace:
        bar = task.noise.alphas_cumprod[t].reshape(-1, 1).float()
        mean = (MEAN + 0.1 * torch.where(y == task.null_label, 0, y)).reshape(-1, 1)
        eps = (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * SPREAD**2 + 1 - bar)
        return SimpleNamespace(sample=torch.cat([eps, torch.full_like(eps, fraction)], dim=1))

    return model


@pytest.mark.parametrize(
    ("method", "steps", "eta"),
    [("ddim", 50, 0.0), ("ddim", 250, 1.0), ("ddpm", 250, 0.0), ("ddpm", 1000, 0.0)],
)
def test_samplers_recover_a_known_gaussian(method: str, steps: int, eta: float):
    task = DDPM(shape=(2,))
    drawn = task.sample(
        exact_denoiser(task), count=8000, generator=seeded(), method=method, steps=steps, eta=eta
    )
    assert drawn.shape == (8000, 2)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(SPREAD, abs=0.03)


def test_labels_and_guidance_steer_the_mean():
    task = DDPM(shape=(2,))
    model = exact_denoiser(task)
    labelled = task.sample(model, count=2000, generator=seeded(), labels=3, steps=100)
    guided = task.sample(
        model,
        count=2000,
        generator=seeded(),
        labels=torch.full((2000,), 3),
        guidance=2.0,
        steps=100,
    )
    assert labelled.mean().item() == pytest.approx(MEAN + 0.3, abs=0.03)
    assert guided.mean().item() == pytest.approx(MEAN + 0.6, abs=0.03)


def test_guidance_can_be_limited_to_the_first_channels():
    task = DDPM(shape=(2,), guided_channels=1)
    guided = task.sample(
        exact_denoiser(task), count=2000, generator=seeded(), labels=3, guidance=2.0, steps=100
    )
    assert guided[:, 0].mean().item() == pytest.approx(MEAN + 0.6, abs=0.03)
    assert guided[:, 1].mean().item() == pytest.approx(MEAN + 0.3, abs=0.03)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_samples_do_not_depend_on_the_batch(method: str):
    task = DDPM(shape=(2,))
    whole, parts = (
        task.sample(
            exact_denoiser(task),
            count=10,
            generator=seeded(),
            method=method,
            steps=10,
            labels=2,
            guidance=1.5,
            batch=size,
        )
        for size in (10, 3)
    )
    assert torch.allclose(whole, parts, atol=1e-6)
    assert not whole.is_inference()


def test_sampling_faults_are_explained():
    model: Any = exact_denoiser(SMALL)
    with pytest.raises(ValueError, match="needs `shape`"):
        DDPM().sample(model, count=1, generator=seeded())
    with pytest.raises(ValueError, match="choose ddim or ddpm"):
        SMALL.sample(model, count=1, generator=seeded(), method="euler")
    with pytest.raises(ValueError, match="4 samples need 4 labels, not 2"):
        SMALL.sample(model, count=4, generator=seeded(), labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="the task is unconditional"):
        DDPM(shape=(1,), label_name=None).sample(model, count=1, generator=seeded(), labels=1)
