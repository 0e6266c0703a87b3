"""A sample's noise is a function of seed, phase and its place: not of batch, process or run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.diagnostics import GraftError
from graftc.distillation.data import open_data
from graftc.tasks import DDPM, RectifiedFlow
from tests.distillation import tiny


class Named:
    """A Task that returns an object of its own, with a table and a word beside the tensors."""

    class Prepared:
        def __init__(self, x: Tensor) -> None:
            self.inputs, self.table, self.kind = {"x": x}, torch.arange(7), "noisy"

        def to(self, device: Any) -> Any:
            return self

    def prepare(self, sample: Any, generator: torch.Generator) -> Any:
        clean = sample["latent"]
        return self.Prepared(clean + torch.randn(clean.shape, generator=generator))


TASKS = {
    "ddpm": DDPM(label_name=None),
    "flow": RectifiedFlow(label_key=None),
    "flow, uniform": RectifiedFlow(label_key=None, t_sampling="uniform"),
    "draws by itself": tiny.Denoise(),
    "an object of its own": Named(),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_process_that_takes_some_rows_sees_the_same_noise(name):
    task, data = TASKS[name], open_data(tiny.latents(20), seed=5)
    whole = data.prepared(task, 3, 8, "stage1")
    parts = [data.prepared(task, 3, 8, "stage1", range(r, r + 4)) for r in (0, 4)]
    for key, value in whole.inputs.items():
        assert torch.equal(value, torch.cat([p.inputs[key] for p in parts]))
        assert len(value.unique(dim=0)) > 4  # rows differ from each other


@pytest.mark.parametrize("name", TASKS)
def test_held_out_samples_have_the_same_noise_in_any_batch(name):
    task, data = TASKS[name], open_data(tiny.latents(20), held_out=6)
    one, other = (
        torch.cat([p.inputs[next(iter(p.inputs))] for p in data.validation(task, size)])
        for size in (4, 6)
    )
    assert torch.equal(one, other)


def test_what_samples_share_is_kept_once():
    made = open_data(tiny.latents(20)).prepared(Named(), 0, 4, "stage1")
    assert (made.kind, made.table.tolist()) == ("noisy", list(range(7)))


def test_a_task_that_differs_from_sample_to_sample_is_told():
    @dataclass(frozen=True)
    class Made:
        inputs: dict[str, Tensor]
        scale: float = field(default=1.0)

    class Odd:
        def prepare(self, sample: Any, generator: torch.Generator) -> Made:
            scale = float(torch.rand((), generator=generator))
            return Made({"x": scale * sample["latent"]}, scale)

    with pytest.raises(GraftError) as raised:
        open_data(tiny.latents(20)).prepared(Odd(), 0, 4, "stage1")
    assert raised.value.diagnostics[0].code == "G534"
    assert "`scale`" in str(raised.value)
