"""Several processes train as one does: 2 here; 4, killed ranks and the launchers themselves are slow tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftc.diagnostics import GraftError
from graftc.distillation import distill, finetune, runs
from graftc.distillation.checkpoint import save_tensors
from graftc.distillation.checkpoint_pieces import Saved
from graftc.distillation.pieces import Rows, in_pieces
from graftc.distillation.ranks import ALONE, Ranks, joined
from graftc.distillation.sharing import check_pieces
from tests.distillation import rank_jobs, tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks of one process")


def launch(
    count: int, folder: Path, *jobs: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.distillation.rank_jobs", str(count), str(folder), *jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights and the facts of the newest run."""
    run = list(runs(folder))[-1]
    facts = runs(folder)[run]
    assert facts["status"] == "finished"
    return load_file(folder / "runs" / run / facts["result"]["weights"]), facts


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference between two runs' weights, and between what they measured."""
    (weights, facts), (others, told) = outcome(one), outcome(other)
    assert weights.keys() == others.keys()
    measured = [0.0]
    for a, b in zip(facts["result"]["sites"], told["result"]["sites"], strict=True):
        assert (a["name"], a["steps"], a["skipped_steps"]) == (
            b["name"],
            b["steps"],
            b["skipped_steps"],
        )
        for key in ("error_start", "error_end", "loss_start", "loss_end"):
            measured.append(abs(a[key] - b[key]))
        pairs = zip(
            (a["bins"] or {"errors": []})["errors"],
            (b["bins"] or {"errors": []})["errors"],
            strict=True,
        )
        measured += [abs(x - y) for x, y in pairs]
    metrics = facts["result"]["metrics"].items()
    measured += [abs(x - told["result"]["metrics"][n]) for n, x in metrics]
    return max(float((weights[n] - others[n]).abs().max()) for n in weights), max(measured)


FAST = ["data", "replay", "sites", "stage2_data", "stage2_pieces"]
ALONE_AS = {"stage2": "stage2_data"}
"""The job that in one process does what a killed one does."""

SLOW = ["stage2_lora", "teacher_pieces"]


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The jobs in two processes, and then one that fails."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(2, folder, *FAST, "held", "broken")


@pytest.fixture(scope="module")
def two(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return launched[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs run in one process, each at most once."""
    return tmp_path_factory.mktemp("one")


def alone(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        rank_jobs.JOBS[name](folder / name)
    return folder / name


@pytest.mark.parametrize("name", FAST)
def test_two_processes_end_where_one_does(two: Path, one: Path, name: str) -> None:
    weights, measured = differences(two / name, alone(one, name))
    assert weights < 1e-5
    assert measured < 1e-5


def test_a_run_of_two_has_one_log_and_says_how_they_shared(two: Path) -> None:
    facts = runs(two / "data")["0001-distill"]
    assert facts["ranks"] == {"size": 2, "parallel": "data"}
    log = (two / "data/runs/0001-distill/log.jsonl").read_text().splitlines()
    assert (
        len([line for line in log if '"start"' in line]) == 2
    )  # of each generation, not of each rank


def test_a_teacher_in_pieces_takes_its_share_of_memory(two: Path) -> None:
    shares = [json.loads((two / "held" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(s["pieces"] for s in shares) == shares[0]["divided"]
    assert max(s["pieces"] for s in shares) < 0.55 * shares[0]["divided"]
    assert shares[0]["left whole"] == 0  # here every parameter is a unit's


def test_a_rank_that_fails_ends_the_job_with_one_diagnostic(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    said = launched[1].stderr
    assert launched[1].returncode == 1
    assert said.count("error[") == 1, said
    assert "the disk of this node is gone" in said
    assert "on rank 1 of 2" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_an_error_in_time(tmp_path: Path) -> None:
    done = launch(2, tmp_path, "stuck", GRAFTC_RANK_TIMEOUT="4")
    assert done.returncode == 1
    assert done.stderr.count("error[G579]") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_end_where_one_does_in_more_ways(
    tmp_path: Path, one: Path, name: str
) -> None:
    done = launch(2, tmp_path, name)
    assert done.returncode == 0, done.stderr
    weights, measured = differences(tmp_path / name, alone(one, name))
    assert weights < 1e-5
    assert measured < 1e-5


LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "--module"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--module"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_the_launchers(tmp_path: Path, one: Path, launcher: str) -> None:
    program, *words = LAUNCHERS[launcher]
    if program == "accelerate":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words[1:1] = ["--main_process_port", str(free.getsockname()[1])]
    command = [str(Path(sys.executable).with_name(program)), *words, "tests.distillation.rank_jobs",
               "0", str(tmp_path), "stage2_data"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "stage2_data")[1]["ranks"] == {"size": 2, "parallel": "data"}
    weights, measured = differences(tmp_path / "stage2_data", alone(one, "stage2_data"))
    assert weights < 1e-5
    assert measured < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_four_processes_end_where_one_does(tmp_path: Path, one: Path, name: str) -> None:
    done = launch(4, tmp_path, name)
    assert done.returncode == 0, done.stderr
    weights, measured = differences(tmp_path / name, alone(one, name))
    assert weights < 1e-5
    assert measured < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", ["data", "sites", "stage2"])
def test_a_rank_is_killed_and_the_run_goes_on_with_others(
    tmp_path: Path, one: Path, name: str, before: int, after: int
) -> None:
    job = f"killed_{name}"
    died = launch(before, tmp_path, job)
    assert died.returncode != 0
    (run,) = runs(tmp_path / job)
    assert runs(tmp_path / job)[run]["status"] == "running"
    assert (tmp_path / job / "runs" / run / "checkpoint.safetensors").exists()
    again = launch(after, tmp_path, job)
    assert again.returncode == 0, again.stderr
    weights, measured = differences(tmp_path / job, alone(one, ALONE_AS.get(name, name)))
    assert weights < 1e-5
    assert measured < 1e-5
    left = sorted(p.name for p in (tmp_path / job / "runs" / run).glob("checkpoint*"))
    assert left == []


@pytest.mark.parametrize("verb", ["distill", "finetune"])
def test_a_way_that_a_stage_does_not_know_is_refused(tmp_path: Path, verb: str) -> None:
    made = rank_jobs.build(tmp_path)
    wrong, near = {"distill": ("site", "sites"), "finetune": ("peices", "pieces")}[verb]
    run = {"distill": distill, "finetune": finetune}[verb]
    with pytest.raises(GraftError, match=f"(?s)G578.*write `{near}`"):
        run(made, rank_jobs.latents(), rank_jobs.Wide(), parallel=wrong)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"compile": True}, "--compile"), ({"reuse": 2}, "--reuse"), ({"cache": "c"}, "--cache"),
     ({"memory": "1GB"}, "--memory"), ({"parallel": "sites"}, "--parallel sites")],
)  # fmt: skip
def test_what_a_teacher_in_pieces_cannot_do_is_told(options: dict[str, Any], word: str) -> None:
    with pytest.raises(GraftError, match=f"(?s)G831.*{word}"):
        check_pieces(tiny.targets(*rank_jobs.SITES), options)


def test_a_parameter_of_two_units_cannot_be_divided() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    with pytest.raises(GraftError, match=r"(?s)G830.*`0` uses it too"):
        in_pieces(model, Ranks(0, 2))
    assert model[0].weight.device.type == "cpu"  # as it was


def test_a_checkpoint_in_pieces_is_read_by_rows(tmp_path: Path) -> None:
    whole = torch.arange(14.0).reshape(7, 2)
    parts = [Rows(0, 4, 7), Rows(4, 7, 7)]
    places: list[tuple[Path, Rows]] = []
    for i, part in enumerate(parts):
        path = tmp_path / f"{i}.safetensors"
        save_tensors(path, {"w": whole[part.start : part.stop]}, {})
        places.append((path, part))
    saved = Saved({}, {"b": torch.ones(2)}, {"w": places})
    assert torch.equal(saved.read("w"), whole)
    assert torch.equal(saved.read("w", Rows(3, 6, 7)), whole[3:6])
    assert torch.equal(saved.read("b"), torch.ones(2))
    with pytest.raises(GraftError, match="G551"):
        Saved({}, {}, {"w": places[:1]}).read("w")


def test_shares_are_whole_and_even() -> None:
    shares = [Ranks(rank, 3).rows(8) for rank in range(3)]
    assert [i for rows in shares for i in rows] == list(range(8))
    assert {len(rows) for rows in shares} == {2, 3}


def test_one_process_communicates_nothing() -> None:
    with joined() as ranks:
        assert ranks is ALONE
        assert ranks.share({"a": 1}) == {"a": 1}
        assert ranks.total([[1.5]]) == [[1.5]]


def test_a_timeout_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRAFTC_RANK_TIMEOUT", "soon")
    with pytest.raises(GraftError, match="G578"), joined():
        pass
