"""`graftc distill` and `graftc finetune` as typed: every flag arrives, bad values are told before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

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
def test_a_dry_run_says_what_it_does_not_count(capsys, build, verb) -> None:
    words = ["--dry-run", "--tensorboard", "--parallel", "data"]
    code, _, err = run(capsys, verb, str(build), "-d", DATA, *words)
    assert code == 0
    assert "not in this plan: --tensorboard, --parallel\n" in err


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


def test_a_run_is_named_to_start_from_and_a_finished_one_resumed_is_its_result(
    capsys, build
) -> None:
    words = ["-d", DATA, "-t", TASK, "--run", "untrained", "--steps", "2", "--batch", "4"]
    words += ["--lr", "0.001", "--seed", "3", "--device", "cpu", "--format", "json"]
    code, out, err = run(capsys, "finetune", str(build), *words)
    assert code == 0, err
    first = json.loads(out)
    facts = yaml.safe_load((Path(first["path"]) / "run.yaml").read_text())
    asked = {"seed": 3, "steps": 2, "batch": 4, "lr": 0.001}
    assert {name: facts["options"][name] for name in asked} == asked
    assert facts["parent"] is None
    code, out, _ = run(
        capsys, "finetune", str(build), "-d", DATA, "--resume", first["id"], "--format", "json"
    )
    assert (code, json.loads(out)["weights"]) == (0, first["weights"])


def test_check_distill_as_typed(capsys, build) -> None:
    words = ["check-distill", str(build), "-d", DATA, "-t", TASK, "--samples", "2", "--seed", "1"]
    code, out, _ = run(capsys, *words, "--steps", "2", "--format", "json")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["blocks.1.attn", "blocks.2.attn"]
    assert all(row["self_graft"] == 0 and row["steps"] <= 2 for row in rows)
    assert code == int(not all(row["passed"] for row in rows))
    code, out, err = run(capsys, *words, "--steps", "1")
    assert (code, out.count("FAIL")) == (1, 2)
    assert "give it more than 1 steps" in err or "too few" in err or "stands still" in err
    assert run(capsys, *words, "--samples", "0")[0] == 2


def test_a_bank_as_typed(capsys, build, tmp_path) -> None:
    bank = str(tmp_path / "bank")
    for seed in ("0", "1"):  # the same sites, trained twice
        words = ["--steps", "2", "--seed", seed, "--bank", bank]
        assert run(capsys, "distill", str(build), "-d", DATA, *words)[0] == 0

    def removed(*flags: str) -> str:
        return run(capsys, "bank", bank, "prune", *flags)[1].splitlines()[-1]

    assert len(json.loads(run(capsys, "bank", bank, "list", "--format", "json")[1])) == 4
    assert removed("--older-than", "1") == "removed 0 entries"
    assert removed("--not-best", "--dry-run") == "would remove 2 entries"
    assert removed("--not-best") == "removed 2 entries"
    assert removed("--site", "blocks.1.*", "--operator", "hyena*") == "removed 1 entry"
    assert run(capsys, "bank", bank)[1].count("blocks.2.attn") == 1


@pytest.mark.parametrize("verb", ["distill", "finetune", "check-distill"])
def test_a_build_compiled_from_other_weights(capsys, build, monkeypatch, verb) -> None:
    """The build links the teacher's weights: what MODEL gives now is not what it was compiled from."""
    from tests.rewrite import models

    def retrained():
        model = made()
        model.module.get_parameter("blocks.3.attn.qkv.weight").data.mul_(1.01)
        return model

    made, before = models.tiny, count(build)
    monkeypatch.setattr(models, "tiny", retrained)
    flags = ["--teacher-weight", "1"] if verb == "finetune" else []
    code, _, err = run(capsys, verb, str(build), "-d", DATA, "--steps", "1", *flags)
    assert (code, "G624" in err) == (1, True), err
    assert count(build) == before
