"""Reuse, cache and site-by-site: fewer teacher passes or less memory, and what stays the same."""

from __future__ import annotations

import resource
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from graftc.diagnostics import GraftError
from graftc.distillation import distill, runs
from graftc.distillation.replay import Window, mixture
from graftc.distillation.targets import Budget
from tests.distillation import tiny
from tests.distillation.test_resume import Killed, build, killer, same

SITES = (
    tiny.attention_site(1, budget=Budget(steps=12)),
    tiny.attention_site(2, budget=Budget(steps=7)),
)


class Counted:
    """A build whose teacher counts its passes; stage 1 reads its first attention in each."""

    def __init__(self, path, sites=SITES, seed=0):
        path.mkdir(exist_ok=True)
        self.passes = 0
        self.build = tiny.FakeBuild(path, tiny.targets(*sites), make_teacher=self.teacher)
        self.seed = seed

    def teacher(self):
        made = tiny.teacher(self.seed)
        made.time.register_forward_hook(self.count)
        return made

    def count(self, module, given, output):
        self.passes += not isinstance(output, torch._subclasses.FakeTensor)

    def run(self, **options):
        given = {"batch": 8, "optimiser": "muon", "stacked": "never"} | options
        data = given.pop("data", None) or tiny.latents(40)
        return distill(self.build, data, given.pop("task", tiny.Denoise()), **given)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40))
def test_each_teacher_batch_is_used_the_same_number_of_times(batches, reuse, steps):
    window = Window(batches, reuse)
    used = Counter()
    for step in range(steps * batches * reuse):
        first, turn, place = window.at(step)
        rows = [(first + place, row) for row in range(3)]
        if turn:
            drawn = mixture(batches, 3, "k", first, turn)[place]
            rows = [(first + number, row) for row, number in enumerate(drawn)]
        used.update(rows)
    assert set(used.values()) == {reuse}
    assert len(used) == 3 * window.passes(steps * batches * reuse)


def test_reuse_spares_teacher_passes_and_still_learns(tmp_path):
    streamed, reused = Counted(tmp_path / "a"), Counted(tmp_path / "b")
    one, other = streamed.run(), reused.run(reuse=3)
    # Five held-out samples are measured in one batch, which is kept: one pass.
    assert (streamed.passes, reused.passes) == (12 + 1, 4 + 1)
    assert [s.error_start for s in one.sites] == [s.error_start for s in other.sites]
    assert all(s.error_end < s.error_start for s in other.sites)


def test_reuse_1_is_streaming_to_the_bit(tmp_path):
    same(Counted(tmp_path / "a").run(), Counted(tmp_path / "b").run(reuse=1))


def test_batches_on_disk_give_the_bits_of_batches_in_memory(tmp_path, monkeypatch):
    from graftc.distillation import planner

    memory = Counted(tmp_path / "a").run(reuse=3)
    monkeypatch.setattr(planner, "available_memory", lambda: 0)
    disk = Counted(tmp_path / "b").run(reuse=3, disk=10**7)
    same(memory, disk)
    assert not (disk.path / "buffer").exists()
    with pytest.raises(GraftError) as raised:
        Counted(tmp_path / "c").run(reuse=3)
    assert raised.value.diagnostics[0].code == "G592"
    assert "leave --reuse out" in str(raised.value)


@pytest.mark.parametrize("at", [5, 12, 20])
def test_a_run_with_reuse_is_resumed_to_the_bit(tmp_path, at):
    options = {"batch": 8, "checkpoint_every": 3, "reuse": 2, "stacked": "never"}
    whole = distill(build(tmp_path / "whole"), tiny.latents(40), tiny.Denoise(), **options)
    made = build(tmp_path / "killed")
    with pytest.raises(Killed):
        distill(made, tiny.latents(40), tiny.Denoise(), progress=killer(at), **options)
    resumed = distill(made, tiny.latents(40), tiny.Denoise(), resume="0001-distill")
    same(resumed, whole)


def test_a_resumed_run_keeps_its_window_with_other_limits(tmp_path, monkeypatch):
    from graftc.distillation import planner

    whole = Counted(tmp_path / "whole").run(reuse=2, checkpoint_every=3)
    made = Counted(tmp_path / "killed")
    with pytest.raises(Killed):
        made.run(reuse=2, checkpoint_every=3, progress=killer(8))
    assert runs(tmp_path / "killed")["0001-distill"]["windows"] == {"0": [6, 2]}
    monkeypatch.setattr(planner, "MOST_KEPT", 2)
    same(distill(made.build, tiny.latents(40), tiny.Denoise(), resume="0001-distill"), whole)


# -- the cache --------------------------------------------------------------------------------


def test_a_second_run_finds_the_batches_of_the_first(tmp_path):
    cache = tmp_path / "cache"
    first, second = Counted(tmp_path / "a"), Counted(tmp_path / "b")
    one = first.run(cache=cache)
    assert len(list(cache.rglob("*.safetensors"))) == 5  # 36 samples in batches of 8
    two = second.run(cache=cache)
    assert (first.passes, second.passes) == (5 + 1, 1)
    same(one, two)
    fewer = Counted(tmp_path / "c", SITES[:1])  # one of its sites needs no other cache
    fewer.run(cache=cache)
    assert fewer.passes == 1


def test_a_killed_run_leaves_a_cache_that_is_whole_so_far(tmp_path):
    cache = tmp_path / "cache"
    whole = Counted(tmp_path / "a").run(cache=tmp_path / "other")
    killed = Counted(tmp_path / "b")
    with pytest.raises(Killed):
        killed.run(cache=cache, progress=killer(3), checkpoint_every=2)
    assert len(list(cache.rglob("*.safetensors"))) == 3
    resumed = Counted(tmp_path / "b")
    same(distill(resumed.build, tiny.latents(40), tiny.Denoise(), resume="0001-distill"), whole)
    assert resumed.passes == 1 + 2  # the held-out batch, and what the cache lacked


class Other(tiny.Denoise):
    """Another task."""


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"batch": 4}, "batch"),
        ({"task": Other()}, "task"),
        ({"data": tiny.latents(48)}, "data"),
        ({"weights": 5}, "weights"),
        ({"sites": (SITES[0], tiny.attention_site(3))}, "lacks the values of `blocks.3.attn`"),
    ],
)
def test_a_stale_cache_is_refused_and_the_difference_named(tmp_path, change, name):
    cache = tmp_path / "cache"
    Counted(tmp_path / "a").run(cache=cache)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    change = dict(change)
    made = Counted(tmp_path / "b", change.pop("sites", SITES), change.pop("weights", 0))
    if "blocks.3" in name:
        made.build.make_student = lambda: tiny.hyena((1, 3))
    with pytest.raises(GraftError) as raised:
        made.run(cache=cache, **change)
    told = raised.value.diagnostics[0]
    assert told.code == "G596"
    assert name in told.message
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path):
    cache, limits = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    made = Counted(tmp_path / "a")

    def fills_up(phase, done, *_):
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    try:
        with pytest.raises(GraftError) as raised:
            made.run(cache=cache, progress=fills_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.diagnostics[0].code == "G594"
    names = sorted(p.name for p in cache.rglob("*") if p.is_file())
    assert names == ["000000.safetensors", "000001.safetensors", "manifest.yaml"]
    whole = Counted(tmp_path / "b").run()
    again = distill(made.build, tiny.latents(40), tiny.Denoise(), resume="0001-distill")
    assert len(list(cache.rglob("*.safetensors"))) == 5
    assert [s.error_start for s in again.sites] == [s.error_start for s in whole.sites]


def test_a_cache_larger_than_its_limit_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(GraftError) as raised:
        Counted(tmp_path / "a").run(cache=tmp_path / "cache", disk=100_000)
    told = raised.value.diagnostics[0]
    assert (told.code, "--reuse" in str(told.help)) == ("G592", True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_shard_that_is_cut_short_is_told(tmp_path):
    cache = tmp_path / "cache"
    Counted(tmp_path / "a").run(cache=cache)
    shard = sorted(cache.rglob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(GraftError) as raised:
        Counted(tmp_path / "b").run(cache=cache)
    assert raised.value.diagnostics[0].code == "G595"


def test_a_batch_that_is_not_finite_is_not_kept(tmp_path):
    data = tiny.latents(40)
    data[7]["latent"][0, 0] = float("nan")
    made = Counted(tmp_path / "a")
    with pytest.raises(GraftError) as raised:
        made.run(cache=tmp_path / "cache", data=data, validation=tiny.latents(4))
    assert raised.value.diagnostics[0].code == "G546"


# -- one site after the other -----------------------------------------------------------------


def test_site_by_site_gives_the_bits_of_all_at_once(tmp_path):
    together, apart = Counted(tmp_path / "a"), Counted(tmp_path / "b")
    one = together.run()
    two = apart.run(site_by_site=True)
    assert one.sites == two.sites
    ours, theirs = load_file(one.weights), load_file(two.weights)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert apart.passes == (12 + 1) + (7 + 1)


@pytest.mark.parametrize("at", [3, 13, 16])
def test_site_by_site_is_resumed_to_the_bit(tmp_path, at):
    whole = Counted(tmp_path / "a").run(site_by_site=True, reuse=2)
    made = Counted(tmp_path / "b")
    with pytest.raises(Killed):
        made.run(site_by_site=True, reuse=2, progress=killer(at), checkpoint_every=3)
    again = distill(made.build, tiny.latents(40), tiny.Denoise(), resume="0001-distill")
    same(again, whole)
