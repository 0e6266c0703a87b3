"""What dropout draws is a function of seed and step on every device, and nothing else is disturbed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from graftc.distillation import (
    distill,
    finetune,
    generation,
    plan_distill,
    plan_finetune,
    planner2,
    stage2,
    stage2_run,
    supply,
)
from graftc.distillation.scopes import random_of
from graftc.distillation.targets import Budget
from tests.distillation import tiny


class Device:
    """The module of an accelerator that is not here, with a generator for each device: as `torch.cuda` has."""

    def __init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(i) for i in range(2)]
        self.current = 0

    @contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def get_rng_state(self):
        return self.generators[self.current].get_state()

    def set_rng_state(self, state):
        self.generators[self.current].set_state(state)

    def manual_seed(self, seed):
        self.generators[self.current].manual_seed(seed)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_device_draws_the_same_at_a_step_and_its_generator_is_put_back(monkeypatch, name, index):
    here = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device: here)
    before = [g.get_state() for g in here.generators]

    def draws(step):
        with random_of(0, "stage2", step, device=name):
            assert here.current == 0  # what else the program does goes on where it was
            own = torch.rand(4, generator=here.generators[index])
            return torch.cat([torch.rand(4), own])

    first, other = draws(1), draws(2)
    assert torch.equal(draws(1), first)
    assert not torch.equal(first[:4], other[:4])
    assert not torch.equal(first[4:], other[4:])

    def fails():
        with random_of(0, "stage2", 1, device=name):
            torch.rand(1, generator=here.generators[index])
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        fails()
    for generator, state in zip(here.generators, before, strict=True):
        assert torch.equal(generator.get_state(), state)


def test_every_step_seeds_the_device_that_it_runs_on(tmp_path, monkeypatch):
    """Both stages, their plans, and the first weights of adapters."""
    seen = []

    def of_device(*key, device=None):
        seen.append(device)
        return random_of(*key)

    for module in (generation, planner2, stage2, stage2_run, supply):
        monkeypatch.setattr(module, "random_of", of_device)
    site = tiny.attention_site(1, budget=Budget(steps=2))
    made = tiny.FakeBuild(tmp_path, tiny.targets(site))
    data, given = tiny.latents(20), {"batch": 4, "device": "cpu"}
    distill(made, data, tiny.Denoise(), **given)
    assert len(seen) == 2  # two steps
    plan_distill(made, data, tiny.Denoise(), **given)
    assert len(seen) == 3  # what is timed
    finetune(made, data, tiny.Denoise(), **given, steps=2, train="lora(2)")
    assert len(seen) == 6  # adapters and two steps
    plan_finetune(made, data, tiny.Denoise(), **given, steps=2)
    assert len(seen) == 7
    assert set(seen) == {"cpu"}
