"""The digits example: its data, its teacher, its score, and that its training can stop and go on."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
MODULES = ("classifier", "data", "frechet", "model", "train")

pytest.importorskip(
    "sklearn", reason="the digits come with scikit-learn (pip install 'graftc[report]')"
)


@pytest.fixture(scope="module")
def digits() -> Iterator[SimpleNamespace]:
    """The example's modules, imported as its scripts import one another, and forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def test_every_digit_is_in_one_part(digits: SimpleNamespace):
    train, held_out = digits.data.split()
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(1797))
    assert len(digits.data.images()) == 1500
    assert len(digits.data.held_out()) == 297


def test_a_sample_is_an_image_and_a_label(digits: SimpleNamespace):
    data = digits.data.images()
    sample = data[7]
    assert sample["latent"].shape == (1, 8, 8)
    assert sample["label"].shape == ()
    assert sample["label"].dtype == torch.int64
    grey = (data.batch()["latent"] + 1) * 8
    assert torch.equal(grey, grey.round())
    assert (grey.min(), grey.max()) == (0, 16)
    assert torch.equal(data.batch([7])["latent"][0], sample["latent"])


def test_iterating_ends_and_changes_to_a_sample_do_not_stay(digits: SimpleNamespace):
    data = digits.data.held_out()
    data[0]["latent"].fill_(9)
    assert sum(1 for _ in data) == 297
    assert data[0]["latent"].max() <= 1


def test_the_model_is_laid_out_as_dit(digits: SimpleNamespace):
    model = digits.model.DiT()
    names = dict(model.named_modules())
    inner = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "adaLN_modulation")
    assert {f"blocks.7.{part}" for part in inner} <= names.keys()
    assert {"x_embedder", "t_embedder", "y_embedder", "final_layer.linear"} <= names.keys()
    assert dict(model.named_buffers()).keys() == {"pos_embed"}
    assert 0.6e6 < sum(p.numel() for p in model.parameters()) < 0.65e6


def test_an_untrained_model_predicts_nothing(digits: SimpleNamespace):
    out = digits.model.DiT()(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10]))
    assert torch.equal(out, torch.zeros(2, 2, 8, 8))


def test_pixels_keep_their_place_through_patches(digits: SimpleNamespace):
    model = digits.model.DiT(size=8, patch=2, depth=1)
    p, g, c = 2, 4, 2
    image = torch.arange(c * 64.0).reshape(1, c, 8, 8)
    tokens = image.reshape(1, c, g, p, g, p).permute(0, 2, 4, 3, 5, 1).reshape(1, g * g, p * p * c)
    assert torch.equal(model._unpatchify(tokens), image)


def test_the_teacher_declares_its_inputs_and_task(digits: SimpleNamespace):
    model = digits.model.teacher()
    assert model.meanings == {"x": "noisy_latent", "t": "timestep", "y": "label"}
    assert model.module(**model.inputs).shape == (2, 2, 8, 8)
    assert model.task.null_label == 10


def test_the_teacher_can_be_built_without_weights(digits: SimpleNamespace):
    with torch.device("meta"):
        assert all(p.is_meta for p in digits.model.teacher().module.parameters())


def trained(digits: SimpleNamespace) -> torch.nn.Module:
    module = digits.model.DiT().eval()
    digits.model.load(module, digits.model.WEIGHTS)
    return module


def test_the_committed_teacher_denoises_digits_it_never_saw(digits: SimpleNamespace):
    assert digits.train.held_out_loss(trained(digits)) < 0.15


def test_the_committed_teacher_draws_the_digits_asked_for(digits: SimpleNamespace):
    drawn = digits.frechet.generate(
        trained(digits), digits.model.task(), samples=40, seed=0, steps=10
    )
    assert (
        digits.classifier.accuracy(
            digits.classifier.classifier(), {"latent": drawn, "label": torch.arange(40) % 10}
        )
        > 0.9
    )


def test_the_classifier_knows_digits_it_never_saw(digits: SimpleNamespace):
    assert (
        digits.classifier.accuracy(digits.classifier.classifier(), digits.data.held_out().batch())
        > 0.97
    )


def test_the_features_of_real_digits_have_full_rank(digits: SimpleNamespace):
    spread = torch.linalg.eigvalsh(torch.cov(digits.frechet.real_features("all").double().T))
    assert spread.min() > 1e-3
    assert spread.sum().item() == pytest.approx(32, rel=0.05)


def test_the_distance_is_that_of_the_fitted_gaussians(digits: SimpleNamespace):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(x.T)).T
    )  # exactly standard
    distance = digits.frechet.frechet_distance
    assert distance(x, x) == pytest.approx(0, abs=1e-9)
    assert distance(x, 3 * x + 1) == pytest.approx(3 * 1 + 3 * (3 - 1) ** 2)
    turned = torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0.5]], dtype=torch.float64)
    a, b = x @ turned, x @ turned.T
    general = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    assert distance(a, b) == pytest.approx(
        (torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * general).item()
    )


def test_a_score_is_repeatable_and_says_how_it_was_got(digits: SimpleNamespace):
    def grey(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x)], dim=1)

    first, second = (
        digits.frechet.score(grey, digits.model.task(), samples=50, seeds=[0, 1], steps=3)
        for _ in range(2)
    )
    assert first == second
    assert len(first.values) == 2
    assert (
        first.protocol
        == "50 samples x 2 seeds, ddim 3 steps, guidance 1.5, against all 1797 digits"
    )
    assert first.mean > 20 * digits.frechet.real_against_real().mean


def test_real_digits_are_near_real_digits(digits: SimpleNamespace):
    assert 0 < digits.frechet.real_against_real().mean < 1


def test_training_can_stop_and_go_on(digits: SimpleNamespace, tmp_path: Path):
    files = {
        "weights": tmp_path / "w.safetensors",
        "state": tmp_path / "s.safetensors",
        "log": tmp_path / "log.jsonl",
    }
    settings = digits.train.Settings(seconds=0.5, batch=4, compile=False)
    digits.train.train(settings, **files, samples=40)
    digits.train.train(replace(settings, seconds=1.0), **files, samples=40)
    first, second = (json.loads(line) for line in files["log"].read_text().splitlines())
    assert 0 < first["step"] < second["step"]
    module = digits.model.DiT()
    digits.model.load(module, files["weights"])
    assert module.blocks[0].adaLN_modulation[1].weight.abs().max() > 0


def test_averaging_keeps_no_graph(digits: SimpleNamespace):
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    digits.train.average(ema, model, 0.5)
    assert not ema.weight.requires_grad
