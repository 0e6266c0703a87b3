"""What every task promises, and the look-up of tasks by name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.tasks import TASKS, Prepared, Task, get_task, primary

IMAGE = {"image": torch.rand(4, 3), "label": torch.tensor([0, 1, 2, 1])}
LATENT = {
    "latent": torch.linspace(-1, 1, 32).reshape(4, 2, 2, 2),
    "label": torch.tensor([3, 1, 2, 0]),
}
TOKENS = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
}
SAMPLES: dict[str, dict[str, Tensor]] = {
    "ddpm": LATENT,
    "rectified_flow": LATENT,
    "causal_lm": TOKENS,
    "classification": IMAGE,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(prepared: Prepared) -> dict[str, Tensor]:
    return {f"in.{k}": v for k, v in prepared.inputs.items()} | {
        f"out.{k}": v for k, v in prepared.targets.items()
    }


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_protocol(name: str):
    assert isinstance(get_task(name)(), Task)


@pytest.mark.parametrize("name", TASKS)
def test_prepare_depends_on_the_generator_alone(name: str):
    task = get_task(name)()
    torch.manual_seed(1)
    first = flat(task.prepare(SAMPLES[name], seeded()))
    torch.manual_seed(2)
    second = flat(task.prepare(SAMPLES[name], seeded()))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", TASKS)
def test_prepare_leaves_the_global_generator_and_the_sample_alone(name: str):
    before, state = {k: v.clone() for k, v in SAMPLES[name].items()}, torch.get_rng_state()
    get_task(name)().prepare(SAMPLES[name], seeded())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in SAMPLES[name].items())


@pytest.mark.parametrize("name", ["ddpm", "rectified_flow"])
def test_another_seed_draws_another_batch(name: str):
    task = get_task(name)()
    assert not torch.equal(
        task.prepare(LATENT, seeded(0)).inputs["x"], task.prepare(LATENT, seeded(1)).inputs["x"]
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_entry_names_the_task_and_what_there_is(name: str):
    with pytest.raises(KeyError, match=rf"{name}.*the data gave \['odd'\]"):
        get_task(name)().prepare({"odd": torch.zeros(1)}, seeded())


def test_an_unknown_task_is_told_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'rectified_flow'"):
        get_task("rectifed_flow")


@pytest.mark.parametrize(
    "outputs",
    [
        torch.ones(2),
        (torch.ones(2), None),
        [torch.ones(2)],
        SimpleNamespace(sample=torch.ones(2)),
        SimpleNamespace(logits=torch.ones(2), loss=None),
    ],
)
def test_primary_finds_the_tensor(outputs: Any):
    assert torch.equal(primary(outputs), torch.ones(2))


@pytest.mark.parametrize("outputs", [None, (), ("text", torch.ones(1)), {"sample": 1}])
def test_primary_refuses_what_holds_no_tensor(outputs: Any):
    with pytest.raises(TypeError, match="a model must return a tensor"):
        primary(outputs)


def test_padding_counts_for_nothing():
    task = get_task("causal_lm")()
    prepared = task.prepare(TOKENS, seeded())
    logits = torch.randn(2, 4, 9, generator=seeded())
    changed = logits.clone()
    changed[0, 2:] = 100.0  # the prediction of a padding token, and what follows the last token
    assert torch.equal(task.loss(logits, prepared), task.loss(changed, prepared))
    assert task.metrics(logits, prepared)["perplexity"] == pytest.approx(
        task.loss(logits, prepared).exp().item()
    )


def test_causal_lm_continues_greedily():
    def counting(input_ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((input_ids + 1) % 10, 10).float()

    out = get_task("causal_lm")().sample(
        counting, count=2, generator=seeded(), prompt=torch.tensor([3, 4]), length=3, temperature=0
    )
    assert out.tolist() == [[3, 4, 5, 6, 7]] * 2


def test_a_classifier_predicts_but_does_not_generate():
    task = get_task("classification")()
    assert task.sample(lambda x: x, count=2, generator=seeded(), inputs=torch.eye(3)).tolist() == [
        0,
        1,
    ]
    with pytest.raises(ValueError, match="generates nothing"):
        task.sample(lambda x: x, count=2, generator=seeded())
