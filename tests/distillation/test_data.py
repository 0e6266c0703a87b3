"""Data: an order that depends on the seed alone, and a diagnostic for each bad DATA."""

from __future__ import annotations

import pytest
import torch

from graftc.diagnostics import Diagnostic, GraftError
from graftc.distillation import call_data, open_data
from graftc.distillation.few import few_samples
from graftc.distillation.inputs import check_inputs
from graftc.distillation.sources import seeded
from tests.distillation import tiny

NUMBERS = [{"i": torch.tensor(i)} for i in range(40)]


def drawn(data, step, batch=8):
    return data.raw(step, batch)["i"].tolist()


class Stream:
    """An iterable without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def test_the_order_depends_on_seed_and_epoch_alone():
    one, two = open_data(NUMBERS, seed=1), open_data(NUMBERS, seed=1)
    in_order = [drawn(one, step) for step in range(12)]
    assert [drawn(two, step) for step in reversed(range(12))] == in_order[::-1]
    assert drawn(open_data(NUMBERS, seed=2), 0) != in_order[0]
    drawn_in_all = [i for batch in in_order for i in batch]
    epoch = drawn_in_all[: one.size]
    assert len(set(epoch)) == one.size == 36  # every sample once an epoch
    assert drawn_in_all[36:72] != epoch


def test_held_out_samples_are_the_same_for_every_seed_and_never_trained_on():
    one, two = open_data(NUMBERS, seed=1), open_data(NUMBERS, seed=2, fraction=0.5)
    held = [int(s["i"]) for s in one.held_out]
    assert held == [int(s["i"]) for s in two.held_out]
    assert len(held) == 4
    assert not set(held) & {i for step in range(30) for i in drawn(two, step)}


def test_a_share_is_a_seeded_subset():
    shares = [open_data(NUMBERS, seed=s, fraction=0.25) for s in (1, 1, 2)]
    seen = [{i for step in range(20) for i in drawn(d, step)} for d in shares]
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 9


def test_one_sample_is_both_and_says_so():
    data = open_data([{"i": torch.tensor(7)}])
    assert [int(s["i"]) for s in data.held_out] == drawn(data, 0, 1) == [7]
    assert [d.code for d in few_samples(data, 1)] == ["G826"]
    apart = open_data([{"i": torch.tensor(7)}], validation=NUMBERS[:2])
    assert few_samples(apart, 1) == ()


def test_fewer_samples_than_a_batch_are_told():
    data = open_data(NUMBERS[:5])
    assert data.size == 4
    (told,) = few_samples(data, 8)
    assert (told.code, told.severity, told.found) == ("G827", "warning", "4")
    assert few_samples(data, 4) == ()


def test_a_stream_is_read_in_order_again_and_again_and_can_jump():
    data = open_data(Stream(NUMBERS), held_out=4)
    assert data.size is None
    assert [int(s["i"]) for s in data.held_out] == [0, 1, 2, 3]
    assert drawn(data, 0) == list(range(4, 12))
    assert drawn(data, 4) == [36, 37, 38, 39, 4, 5, 6, 7]
    assert drawn(data, 1) == list(range(12, 20))
    limited = open_data(Stream(NUMBERS), samples=6, held_out=4)
    assert drawn(limited, 1) == [6, 7, 8, 9, 4, 5, 6, 7]


def test_a_generator_function_can_be_read_twice():
    def images():
        yield from NUMBERS

    assert drawn(open_data(call_data(images), held_out=4), 8) == [32, 33, 34, 35, 36, 37, 38, 39]


def test_noise_depends_on_seed_phase_and_step():
    task = tiny.Denoise()
    data = open_data(tiny.latents(20), seed=5)
    again = open_data(tiny.latents(20), seed=5)
    one, two = data.prepared(task, 3, 4, "stage1"), again.prepared(task, 3, 4, "stage1")
    assert torch.equal(one.inputs["x"], two.inputs["x"])
    assert not torch.equal(one.inputs["t"], data.prepared(task, 4, 4, "stage1").inputs["t"])
    assert not torch.equal(one.inputs["t"], data.prepared(task, 3, 4, "stage2").inputs["t"])


class Raises:
    def __len__(self):
        return 5

    def __getitem__(self, index):
        raise OSError("disk gone")


@pytest.mark.parametrize(
    ("data", "options", "code", "told"),
    [
        ([], {}, "G520", "empty"),
        (Stream([]), {}, "G520", "empty"),
        (Stream(NUMBERS[:2]), {"held_out": 2}, "G520", "held out"),
        ([torch.ones(2)] * 5, {}, "G521", r"found: [2] float32"),
        ([(1, 2)] * 5, {}, "G521", "tuple"),
        ([{"a": "cat"}] * 5, {}, "G521", "`a`"),
        ([{"a": torch.ones(2 + (i == 3))} for i in range(5)], {}, "G522", "[3] float32"),
        ([{"a": 1, **({"b": 2} if i == 3 else {})} for i in range(5)], {}, "G522", "a, b"),
        ((s for s in NUMBERS), {}, "G523", "__iter__"),
        (Stream(NUMBERS), {"fraction": 0.1}, "G524", "samples = 8k"),
        (3, {}, "G525", "int"),
        ({"a": torch.ones(3)}, {}, "G525", "dict"),
        (Raises(), {}, "G527", "disk gone"),
    ],
)
def test_bad_data_is_told(data, options, code, told):
    def read():
        opened = open_data(data, **options)
        for step in range(5):
            opened.raw(step, 2)

    with pytest.raises(GraftError) as raised:
        read()
    assert raised.value.diagnostics[0].code == code, str(raised.value)
    assert told in str(raised.value)


def test_a_key_that_the_task_misses_is_told_with_what_the_data_has():
    data = open_data([{"image": torch.ones(3)}] * 5)
    with pytest.raises(GraftError) as raised:
        data.prepared(tiny.Denoise(), 0, 2, "stage1")
    assert raised.value.diagnostics[0].code == "G526"
    assert "latent" in str(raised.value)
    assert "image [2, 3] float32" in str(raised.value)


GOOD = {"x": torch.ones(2, tiny.TOKENS, tiny.DIM), "t": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({"t": None}, "G530", "lacks the input `t` (timestep)"),
        ({"t": None, "tt": GOOD["t"]}, "G530", "is it `t`?"),
        ({"mask": GOOD["t"]}, "G531", "`mask`"),
        ({"x": torch.ones(2, 4, tiny.DIM)}, "G532", "found: [2, 4, 16] float32"),
        ({"x": torch.ones(2, tiny.DIM)}, "G532", "wanted: x [batch, 8, 16] float32"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, "G532", "`batch` is 2 in `x`"),
        ({"t": torch.zeros(2)}, "G533", "wanted: t [batch] int64"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_told(change, code, told):
    given = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(GraftError) as raised:
        check_inputs(given, tiny.INPUTS, "step 3")
    assert raised.value.diagnostics[0].code == code
    assert told in str(raised.value)
    assert "step 3" in str(raised.value)


def test_another_float_width_passes():
    check_inputs({**GOOD, "x": GOOD["x"].bfloat16()}, tiny.INPUTS, "step 0")


def test_a_seed_of_parts_is_not_their_sum():
    draws = {float(torch.rand((), generator=seeded(a, b))) for a in range(5) for b in range(5)}
    assert len(draws) == 25


def broken(count):
    def images():
        yield from NUMBERS[:count]
        raise OSError("disk gone")  # here

    return images


class Unreadable:
    def __iter__(self):
        raise OSError("disk gone")  # here


class Unsized(Raises):
    def __len__(self):
        raise OSError("disk gone")  # here


class Told(Raises):
    def __getitem__(self, index):
        raise GraftError(Diagnostic("G900", "told already"))


@pytest.mark.parametrize(
    ("data", "options", "site"),
    [
        (call_data(broken(2)), {"held_out": 4}, "DATA"),  # while samples are held out
        (call_data(broken(8)), {"held_out": 4}, "DATA"),  # while it trains
        (Unreadable(), {}, "DATA"),
        (Unsized(), {}, "DATA"),
        (NUMBERS, {"validation": Unsized()}, "held-out DATA"),
        (NUMBERS, {"validation": call_data(broken(2))}, "held-out DATA"),
        (NUMBERS, {"validation": Raises()}, "held-out DATA[0]"),
    ],
)
def test_what_data_raises_is_told_with_the_line_of_the_user(data, options, site):
    def read():
        opened = open_data(data, **options)
        for step in range(5):
            opened.raw(step, 2)

    with pytest.raises(GraftError) as raised:
        read()
    (found,) = raised.value.diagnostics
    assert (found.code, found.site) == ("G527", site)
    assert "DATA raised OSError: disk gone" in found.message
    assert __file__ in found.notes[0].message
    assert 'raise OSError("disk gone")' in found.notes[0].message
    assert not any("graftc/distillation" in note.message for note in found.notes)


def test_a_diagnostic_from_data_stays_as_it_is():
    with pytest.raises(GraftError) as raised:
        open_data(Told())
    assert raised.value.diagnostics[0].code == "G900"
    assert raised.value.__cause__ is None
