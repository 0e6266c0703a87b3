"""Rectified flow: the path, its velocity, and sampling along it."""

import pytest
import torch
from torch import Tensor

from graftc.tasks import RectifiedFlow

MEAN, SPREAD = 0.7, 0.4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_path_runs_straight_from_data_to_noise():
    prepared = RectifiedFlow(null_label=5).prepare(
        {"latent": torch.randn(64, 3), "label": torch.arange(64) % 5}, seeded()
    )
    t, start = prepared.targets["t"][:, None], prepared.targets["x_start"]
    assert torch.allclose(prepared.inputs["x"], start + t * prepared.targets["velocity"], atol=1e-6)
    assert torch.allclose(prepared.targets["velocity"], prepared.targets["noise"] - start)


@pytest.mark.parametrize("how", ["uniform", "logit_normal"])
def test_times_lie_between_data_and_noise(how: str):
    task = RectifiedFlow(t_sampling=how, t_scale=1000, label_key=None)  # type: ignore[arg-type]
    prepared = task.prepare({"latent": torch.zeros(5000, 1)}, seeded())
    assert prepared.inputs["t"].min() >= 0
    assert prepared.inputs["t"].max() <= 1000
    assert prepared.targets["t"].mean().item() == pytest.approx(0.5, abs=0.02)


def test_shift_moves_time_towards_noise():
    task = RectifiedFlow(shift=3.0, label_key=None)
    assert task.prepare({"latent": torch.zeros(5000, 1)}, seeded()).targets["t"].mean() > 0.65


def test_conditions_pass_through():
    task = RectifiedFlow(label_key=None, conditions=(("caption", "encoder_hidden_states"),))
    caption = torch.randn(2, 7, 3)
    inputs = task.prepare({"latent": torch.zeros(2, 4), "caption": caption}, seeded()).inputs
    assert inputs["encoder_hidden_states"] is caption
    assert "y" not in inputs


def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The mean velocity at x for data N(MEAN + y / 10, SPREAD^2), from Bayes' rule; label 1000 is none."""
    t, mean = t[:, None], (MEAN + 0.1 * torch.where(y == 1000, 0, y))[:, None]
    centre, variance = (1 - t) * mean, (1 - t) ** 2 * SPREAD**2 + t**2
    noise = t * (x - centre) / variance
    start = mean + (1 - t) * SPREAD**2 * (x - centre) / variance
    return noise - start


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_recover_a_known_gaussian(shift: float):
    drawn = RectifiedFlow(shape=(2,), shift=shift).sample(
        exact, count=8000, generator=seeded(), steps=100, batch=3000
    )
    assert drawn.shape == (8000, 2)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(SPREAD, abs=0.02)


def test_guidance_steers_the_mean():
    drawn = RectifiedFlow(shape=(2,)).sample(
        exact, count=4000, generator=seeded(), steps=100, labels=3, guidance=2.0
    )
    assert drawn.mean().item() == pytest.approx(MEAN + 0.6, abs=0.02)


def test_a_velocity_of_the_wrong_shape_is_refused():
    task = RectifiedFlow(label_key=None)
    prepared = task.prepare({"latent": torch.zeros(2, 4)}, seeded())
    with pytest.raises(ValueError, match=r"shape \(2, 4\), the model gave \(2, 3\)"):
        task.loss(torch.zeros(2, 3), prepared)
