"""`graftc distill` and `graftc finetune` as typed: every flag arrives, bad values are told before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftc import verbs
from tests.cli.test_cli import run

MODEL = "tests.rewrite.models:tiny"
DATA = "tests.distillation.test_bank:tokens"
TASK = "tests.distillation.test_bank:Noisy"
RULE = """
rule h {
    match   a = self_attention in blocks {1, 2}
    replace a with hyena_x()
    distill l2, steps = 6, batch = 8
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("typed")
    (folder / "r.graft").write_text(RULE)
    verbs.compile(folder / "r.graft", MODEL, folder / "b", task=TASK)
    return folder / "b"


def count(build: Path) -> int:
    return len(list((build / "runs").glob("*"))) if (build / "runs").is_dir() else 0


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["--reuse", "4"], {"reuse": 4}),
        (["--reuse", "auto", "--memory", "1GB", "--disk", "5GB"], {"reuse": "auto", "memory": "1GB", "disk": "5GB"}),
        (["--cache", "kept"], {"cache": Path("kept")}),
        (["--site-by-site"], {"site_by_site": True}),
        (["--device", "cuda:1", "--compile"], {"device": "cuda:1", "compile": True}),
        (["--parallel", "data", "--shard-teacher"], {"parallel": "data", "shard_teacher": True}),
        (["--bank", "B", "--resume", "0001-distill"], {"bank": Path("B"), "resume": "0001-distill"}),
        (["--steps", "7", "--batch", "3", "--lr", "0.1", "--seed", "5", "--tensorboard"],
         {"steps": 7, "batch": 3, "lr": 0.1, "seed": 5, "tensorboard": True}),
    ],
)  # fmt: skip
def test_each_flag_of_distill_arrives(capsys, monkeypatch, flags, given) -> None:
    seen: dict[str, object] = {}

    class Stopped(Exception):
        pass

    def record(directory, data, **options):
        seen.update(options)
        raise Stopped

    monkeypatch.setattr(verbs, "distill", record)
    with pytest.raises(Stopped):
        run(capsys, "distill", "b", "-d", DATA, *flags)
    for name in ("progress", "command", "announce", "task"):
        seen.pop(name)
    assert seen == {"device": "cpu", **given}


def test_a_run_of_both_stages_as_json(capsys, build) -> None:
    code, out, err = run(
        capsys, "distill", str(build), "-d", DATA, "--reuse", "2", "--site-by-site", "--format", "json"
    )  # fmt: skip
    assert code == 0, err
    first = json.loads(out)
    assert [s["name"] for s in first["sites"]] == ["blocks.1.attn", "blocks.2.attn"]
    assert first["steps"] == 12
    code, out, _ = run(
        capsys, "finetune", str(build), "-d", DATA, "--steps", "4", "--batch", "8", "--train", "lora(2)", "--format", "json"
    )  # fmt: skip
    second = json.loads(out)
    assert (code, second["stage"], second["steps"]) == (0, "finetune", 4)
    assert Path(second["weights"]).is_file()
    assert (Path(second["path"]) / "adapter" / "adapter_config.json").is_file()


def test_a_dry_run_writes_nothing(capsys, build) -> None:
    before = count(build)
    code, out, _ = run(capsys, "distill", str(build), "-d", DATA, "--dry-run", "--format", "json")
    assert code == 0
    assert json.loads(out)["peak_memory"] > 0
    assert count(build) == before


@pytest.mark.parametrize("verb", ["distill", "finetune"])
@pytest.mark.parametrize("device", ["nonsense", "cuda:x"])
def test_a_device_that_is_not_there(capsys, build, verb, device) -> None:
    before = count(build)
    code, _, err = run(capsys, verb, str(build), "-d", DATA, "--device", device)
    assert code == 1
    assert "G568" in err
    assert device in err
    assert count(build) == before


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--reuse", "some"], 2, "number or `auto`"),
        (["--reuse", "0"], 1, "G590"),
        (["--memory", "lots"], 1, "G590"),
        (["--memory", "1kB"], 1, "G592"),
        (["--resume", "0009-distill"], 1, "G560"),
    ],
)
def test_bad_values(capsys, build, flags, code, says) -> None:
    found, _, err = run(capsys, "distill", str(build), "-d", DATA, *flags)
    assert (found, says in err) == (code, True), err
