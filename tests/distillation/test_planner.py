"""What is predicted before a run starts, against what the run does: bytes counted, not timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graftc.cli.plans import show_training_plan
from graftc.diagnostics import GraftError
from graftc.distillation import buffer, distill, plan_distill, to_dict
from graftc.distillation.activations import Teacher
from graftc.distillation.generation import Generation
from graftc.distillation.planner import (
    Costs,
    Machine,
    Wanted,
    choose,
    natural_reuse,
    smaller,
)
from graftc.distillation.resident import Allocator, Bytes
from graftc.distillation.sizes import Layout, Live, PassCost, StudentCost, Value, pass_cost
from graftc.distillation.targets import Budget
from graftc.units import read_size
from tests.distillation import tiny

SITES = tuple(tiny.attention_site(i, budget=Budget(steps=8)) for i in (1, 2, 3))
ROOMY = Machine(0, 10**10, 10**10)


def build(path):
    """A build whose models are there before the run: the run's own bytes are what is counted."""
    path.mkdir(exist_ok=True)
    models = {"teacher": tiny.teacher(), "student": tiny.hyena((1, 2, 3))}
    return tiny.FakeBuild(
        path,
        tiny.targets(*SITES),
        make_teacher=lambda: models["teacher"],
        make_student=lambda: models["student"],
    )


MODES = {
    "stream": {},
    "replay 2": {"reuse": 2},
    "replay 4": {"reuse": 4},
    "cache": {"cache": "cache"},
    "site by site": {"site_by_site": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_peak_memory_is_predicted_within_a_fifth(tmp_path, mode, monkeypatch):
    monkeypatch.setattr(buffer, "paged", torch.clone)  # pages of its own are no tensor to count
    options = {"batch": 256, "stacked": "never", **MODES[mode]}
    if "cache" in options:
        options["cache"] = tmp_path / "cache"
    made, data = build(tmp_path / "build"), tiny.latents(1600)
    plan = plan_distill(made, data, tiny.Denoise(), **options)
    weights = plan.groups[0][0].weights
    with Live() as live:
        distill(made, data, tiny.Denoise(), **options)
    assert live.peak == pytest.approx(plan.groups[0][1].tensors - weights, rel=0.2)
    assert {c.mode for _, c in plan.groups} == {mode.split()[0] if "site" not in mode else "stream"}


def test_modes_differ_in_memory_as_they_should(tmp_path):
    def peak(**options):
        given = {"batch": 256, "stacked": "never", **options}
        made = plan_distill(build(tmp_path / "b"), tiny.latents(1600), tiny.Denoise(), **given)
        return max(choice.tensors for _, choice in made.groups)

    assert peak(site_by_site=True) < peak() < peak(reuse=4)
    assert peak(cache=tmp_path / "c") == peak()
    assert not (tmp_path / "c").exists()  # nothing is written


def test_what_passes_takes_more_of_a_heap_and_what_is_large_does_not():
    heap = Allocator(code=100, holes=2.0)
    tensors, small = Bytes(2 * 10**6), Bytes(2 * 10**6, small=10**6)
    assert heap.resident(7, [tensors]) == 100 + 7 + tensors.alive
    assert heap.resident(7, [small]) == 100 + 7 + 10**6 + 2 * 10**6
    seen = replace(heap, heap=5 * 10**6)  # steps were run
    assert seen.resident(7, [small]) == 100 + 7 + 10**6 + 5 * 10**6
    assert seen.unmeasured() == heap
    live = Live()
    with live:
        kept = [
            torch.empty(16 * 2**20, dtype=torch.uint8),
            torch.empty(32 * 2**20, dtype=torch.uint8),
        ]
    assert live.most == Bytes(48 * 2**20, 16 * 2**20)
    del kept


def test_a_pass_is_priced_as_it_runs():
    teacher = Teacher(tiny.teacher(), tiny.INPUTS)
    raw = {"latent": torch.stack([s["latent"] for s in tiny.latents(16)])}
    made = tiny.Denoise().prepare(raw, torch.Generator())
    cuts = tuple(s.teacher for s in SITES)
    found = pass_cost(teacher, cuts, {k: v[:1] for k, v in made.inputs.items()}, 16)
    with Live() as live:
        batch = teacher.run(cuts, made, "a")
    entering = sum(v.nbytes for v in made.inputs.values())
    assert live.peak + entering == found.peak.alive
    kept = sum(v.nbytes for values in batch.values for v in values) + entering
    assert found.layout.nbytes(cuts) == kept


# -- choices ----------------------------------------------------------------------------------


def costs(teacher=8, student=2, kept=10**6, **changes) -> Costs:
    """A group whose batch takes `kept` bytes, with FLOPs to choose by."""
    layout = Layout({"0": Value((4, 8), torch.float32, 1, kept)}, {SITES[0].teacher: ("0",)})
    made = Costs(
        ("a", "b"),
        4,
        100,
        400,
        PassCost(layout, Bytes(2 * kept), teacher),
        StudentCost(Bytes(3 * kept), Bytes(kept), student),
        0,
        0,
        0,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(("teacher", "reuse"), [(1, 1), (2, 1), (3, 2), (8, 4), (1000, 8)])
def test_reuse_is_chosen_from_the_flops(teacher, reuse):
    assert natural_reuse(costs(teacher)) == reuse
    made = choose(costs(teacher), Wanted("auto"), ROOMY)
    assert (made.reuse, made.mode) == (reuse, "stream" if reuse == 1 else "replay")


def test_a_window_fits_the_memory_then_the_disk():
    made = choose(costs(), Wanted(4, memory=10**7), ROOMY)  # streaming takes 4 MB of the 10
    assert (made.window.batches, dict(made.places)) == (5, {"memory": 5 * 10**6})
    assert made.peak <= 10**7
    spilled = choose(costs(), Wanted(4, memory=10**7, disk=10**7), ROOMY)
    assert dict(spilled.places) == {"memory": 5 * 10**6, "disk": 8 * 10**6}
    assert spilled.passes == 26  # two windows of 13, the second not used to its end
    on_gpu = choose(costs(), Wanted(4, memory=3 * 10**6), Machine(10**7, 10**9, 10**9))
    assert dict(on_gpu.places) == {"device": 5 * 10**6, "memory": 2 * 10**6}


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(4, memory=10**6), "--site-by-site"),
        (Wanted(4, memory=45 * 10**5), "leave --reuse out"),
        (Wanted(0), "once"),
    ],
)
def test_settings_that_do_not_fit_are_told_with_the_next_smaller(wanted, says):
    with pytest.raises(GraftError) as raised:
        choose(costs(), wanted, ROOMY)
    assert raised.value.diagnostics[0].code in ("G590", "G592")
    assert says in str(raised.value)


def test_the_next_smaller_setting_is_smaller_down_to_one_sample():
    replayed = choose(costs(), Wanted(4, memory=10**7), ROOMY)
    assert smaller(costs(), replayed).startswith("--reuse 4 --memory")
    streamed = choose(costs(), Wanted(), ROOMY)
    assert "--site-by-site" in smaller(costs(), streamed)
    assert "--batch 2" in smaller(costs(sites=("a",)), streamed)
    assert "more memory" in smaller(costs(sites=("a",), batch=1), streamed)


@pytest.mark.parametrize("text", ["", "x", "-1GB", "8 apples", "nan"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(GraftError) as raised:
        read_size(text, "--memory")
    assert raised.value.diagnostics[0].code == "G590"


def test_out_of_memory_is_told_with_the_next_smaller_setting(tmp_path, monkeypatch):
    def full(self, step, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Generation, "_step", full)
    with pytest.raises(GraftError) as raised:
        distill(build(tmp_path / "b"), tiny.latents(80), tiny.Denoise(), batch=16)
    told = raised.value.diagnostics[0]
    assert (told.code, "--site-by-site" in str(told.help)) == ("G593", True)
    assert (tmp_path / "b" / "runs" / "0001-distill" / "checkpoint.safetensors").is_file()


def test_sites_that_nothing_trains_are_planned_and_said(tmp_path, capsys):
    untrained = [tiny.attention_site(i, budget=Budget(steps=0)) for i in (1, 2)]
    made = tiny.FakeBuild(
        tmp_path, tiny.targets(*untrained), make_student=lambda: tiny.hyena((1, 2))
    )
    plan = plan_distill(made, tiny.latents(64), tiny.Denoise(), steps=60)
    show_training_plan(plan)
    said = capsys.readouterr().out
    assert "2 sites" in said
    assert "first weights alone" in said
    assert plan.to_dict()["groups"][0]["others"] == []


@pytest.mark.slow
def test_16384_tokens_site_by_site_take_the_memory_of_one_site(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "TOKENS", 16_384)
    tokens = (replace(tiny.INPUTS[0], shape=("batch", 16_384, tiny.DIM)), tiny.INPUTS[1])
    monkeypatch.setattr(tiny, "INPUTS", tokens)
    data = tiny.latents(4)

    def streamed(self, x):  # a head axis: without one torch makes the N x N scores
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    monkeypatch.setattr(tiny.Attention, "forward", streamed)

    def peak(name, sites, **options):
        made = build(tmp_path / name)
        made.targets = to_dict(replace(tiny.targets(*sites), inputs=tokens))
        given = {"batch": 1, "steps": 2, "threads": 1, "stacked": "never", **options}
        with Live() as live:
            found = distill(made, data, tiny.Denoise(), **given)
        assert all(site.error_end < site.error_start for site in found.sites)
        return live.peak

    one = peak("one", SITES[-1:])
    apart = peak("apart", SITES, site_by_site=True)
    together = peak("together", SITES)
    assert apart < 1.1 * one
    assert together > 1.5 * one
