"""DATA of every kind: shards, encoded once, torch's and Hugging Face's data sets."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

import graftc
from graftc import verbs
from graftc.diagnostics import GraftError
from graftc.distillation import distill
from graftc.distillation.data import open_data
from graftc.distillation.shards import Shards
from tests.distillation import tiny
from tests.distillation.test_resume import Killed, build, killer, same


def write(folder, sizes=(3, 1, 4), names=("latent", "label")):
    folder.mkdir()
    first = 0
    for number, size in enumerate(sizes):
        rows = torch.arange(first, first + size, dtype=torch.float32)
        save_file(
            {n: rows[:, None].expand(size, 2).contiguous() for n in names},
            folder / f"{number}.safetensors",
        )
        first += size
    return folder


def test_a_folder_of_shards_is_data(tmp_path):
    data = verbs.load_data(str(write(tmp_path / "d")))
    assert isinstance(data, Shards)
    assert [int(data[i]["latent"][0]) for i in range(len(data))] == list(range(8))
    assert open_data(data, held_out=2).raw(0, 3)["label"].shape == (3, 2)


def test_training_on_a_folder_is_training_on_its_samples(tmp_path):
    samples = tiny.latents(40)
    (tmp_path / "d").mkdir()
    for number in range(4):
        part = torch.stack([s["latent"] for s in samples[10 * number : 10 * number + 10]])
        save_file({"latent": part}, tmp_path / "d" / f"{number}.safetensors")
    options = {"batch": 8, "stacked": "never", "checkpoint_every": 3}
    whole = distill(build(tmp_path / "a"), samples, tiny.Denoise(), **options)
    made = build(tmp_path / "b")
    with pytest.raises(Killed):
        distill(made, Shards(tmp_path / "d"), tiny.Denoise(), progress=killer(7), **options)
    resumed = distill(made, Shards(tmp_path / "d"), tiny.Denoise(), resume="0001-distill")
    same(resumed, whole)


@pytest.mark.parametrize("wrong", ["empty", "names", "lengths", "cut short"])
def test_a_folder_that_is_no_data_is_told(tmp_path, wrong):
    folder = write(tmp_path / "d", sizes=() if wrong == "empty" else (3, 1))
    if wrong == "names":
        save_file({"other": torch.zeros(2)}, folder / "5.safetensors")
    if wrong == "lengths":
        save_file(
            {"latent": torch.zeros(2, 2), "label": torch.zeros(3, 2)}, folder / "5.safetensors"
        )
    if wrong == "cut short":
        (folder / "1.safetensors").write_bytes((folder / "1.safetensors").read_bytes()[:40])
    with pytest.raises(GraftError) as raised:
        Shards(folder)
    assert raised.value.diagnostics[0].code == "G598"


# -- encoded once -----------------------------------------------------------------------------


class Encoder:
    """Stands for a VAE and a text encoder."""

    def __init__(self, fails_at=None):
        self.seen, self.fails_at = 0, fails_at

    def __call__(self, samples):
        self.seen += len(samples)
        if self.fails_at is not None and self.seen > self.fails_at:
            raise RuntimeError("the encoder's machine went away")
        pixels = torch.stack([s["pixels"] for s in samples])
        return {"latent": pixels.mean(-1), "label": torch.tensor([s["label"] for s in samples])}


def images(count=11):
    return [{"pixels": torch.full((2, 4), float(i)), "label": i} for i in range(count)]


def test_outputs_of_an_encoder_are_computed_once(tmp_path):
    encode = Encoder()
    data = graftc.cached(images(), encode, tmp_path / "l", key="mean", batch=2, shard=4)
    again = graftc.cached(
        lambda: pytest.fail("DATA is read again"), encode, tmp_path / "l", key="mean"
    )
    assert encode.seen == 11
    for found in (data, again):
        assert [
            (float(s["latent"][0]), int(s["label"])) for s in (found[i] for i in range(11))
        ] == [(float(i), i) for i in range(11)]


def test_an_encoder_that_broke_off_goes_on_where_it_was(tmp_path):
    with pytest.raises(GraftError) as raised:
        graftc.cached(images, Encoder(fails_at=9), tmp_path / "l", key="mean", batch=2, shard=4)
    assert "went away" in str(raised.value)
    rest = Encoder()
    data = graftc.cached(images, rest, tmp_path / "l", key="mean", batch=2, shard=4)
    assert (len(data), rest.seen) == (11, 3)


@pytest.mark.parametrize(
    ("encode", "key", "code"),
    [
        (Encoder(), "another", "G536"),
        (lambda samples: torch.zeros(2), "x", "G535"),
        (lambda samples: {"latent": torch.zeros(1, 2)}, "x", "G535"),
    ],
)
def test_a_cache_of_another_encoder_and_outputs_that_are_no_batch_are_told(
    tmp_path, encode, key, code
):
    if code == "G536":
        graftc.cached(images(), Encoder(), tmp_path / "l", key="mean")
    with pytest.raises(GraftError) as raised:
        graftc.cached(images(), encode, tmp_path / "l", key=key)
    assert raised.value.diagnostics[0].code == code


# -- data sets of others ----------------------------------------------------------------------


class Mapped(TorchDataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"latent": torch.full((2,), float(index))}


class Streamed(IterableDataset):
    def __iter__(self):
        return ({"latent": torch.full((2,), float(i))} for i in range(20))


class HubStream:
    """As `datasets.IterableDataset`: no length, iterated again from its start, values as lists."""

    def with_format(self, kind):
        assert kind == "torch"
        return self

    def __iter__(self):
        return ({"latent": [float(i), float(i)]} for i in range(20))


@pytest.mark.parametrize(
    "data", [Mapped(), Streamed(), HubStream()], ids=lambda d: type(d).__name__
)
def test_a_data_set_of_torch_or_hugging_face_is_data_and_its_position_is_kept(data):
    one, other = open_data(data, samples=16, held_out=4), open_data(data, samples=16, held_out=4)
    steps = [one.raw(step, 4)["latent"] for step in range(6)]
    assert torch.equal(other.raw(5, 4)["latent"], steps[5])  # as a resumed run asks for it
    seen = torch.cat(steps[:4])[:, 0].tolist()
    assert len(set(seen)) == 16
    assert not {float(s["latent"][0]) for s in one.held_out} & set(seen)


def test_a_data_set_on_disk_is_streamed_by_the_package_itself(tmp_path):
    """`hf:FOLDER` of parquet files, with the real `datasets` where it is installed: no network."""
    datasets = pytest.importorskip("datasets")
    rows = [{"latent": [float(i), float(i)], "label": i % 3} for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    data = verbs.load_data(f"hf:{tmp_path}")
    one, other = open_data(data, samples=30, held_out=4), open_data(data, samples=30, held_out=4)
    steps = [one.raw(step, 4)["latent"] for step in range(9)]  # into the second epoch
    assert torch.equal(other.raw(8, 4)["latent"], steps[8])  # as a resumed run asks for it
    assert steps[0].tolist() == [[4.0, 4.0], [5.0, 5.0], [6.0, 6.0], [7.0, 7.0]]
    with pytest.raises(GraftError) as raised:
        verbs.load_data(f"hf:{tmp_path}:test")
    assert raised.value.diagnostics[0].code == "G599"


def test_a_name_on_the_hub_is_streamed(monkeypatch):
    asked = []
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = lambda *args, **options: asked.append((args, options)) or HubStream()
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert len(list(verbs.load_data("hf:org/digits#small:test"))) == 20
    assert asked == [(("org/digits", "small"), {"split": "test", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GraftError) as raised:
        verbs.load_data("hf:org/digits")
    assert raised.value.diagnostics[0].code == "G599"
