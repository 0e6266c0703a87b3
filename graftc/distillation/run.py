"""A run: its directory `DIR/runs/ID`, its lock, its log, its checkpoint, and its result."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError, fail, nearest
from graftc.distillation.checkpoint import load_tensors, load_yaml, save_tensors, save_yaml
from graftc.distillation.ranks import ALONE, Ranks

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with (phase, steps done, steps in all, values); an exception in it stops the run."""

VERSION = 1
CHECKPOINT = "checkpoint.safetensors"


class Build(Protocol):
    """What training needs of a build (`graftc.emit.build.Build`)."""

    @property
    def path(self) -> Path: ...

    @property
    def targets(self) -> Mapping[str, Any]: ...

    def teacher(self) -> nn.Module: ...

    def student(self) -> nn.Module: ...

    def candidate(self, package: str) -> nn.Module: ...


@dataclass(frozen=True)
class SiteResult:
    """A site after stage 1.

    Errors are ‖student − teacher‖² / ‖teacher‖² over the held-out samples; losses are the site's
    own. `skipped_steps` counts steps whose gradient was no number. A site that was exact from the
    start has 0 steps. `candidate` counts those of `one of`: 0 is the one in the student. `bins`: errors
    by bins of the task's time (`edges`, one more than `errors`), None where the task has no time.
    `reused`: where the weights came from, of a site that a bank had; it has 0 steps too.
    """

    name: str
    operator: str
    error_start: float
    error_end: float
    loss_start: float
    loss_end: float
    steps: int
    skipped_steps: int = 0
    candidate: int = 0
    bins: Mapping[str, list[float]] | None = None
    reused: str = ""

    @property
    def key(self) -> str:
        """The site's name, and the candidate's number where it is not the student's own."""
        return f"{self.name}/{self.candidate}" if self.candidate else self.name


@dataclass(frozen=True)
class RunResult:
    """What a finished run made: `weights` holds the model's full state; `warnings` is what to know of its figures."""

    id: str
    path: Path
    stage: str
    weights: Path
    steps: int
    seconds: float
    sites: tuple[SiteResult, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    warnings: tuple[str, ...] = ()


class Run:
    """A run's directory, open for writing by this process alone."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.facts = facts
        self._log = path / "log.jsonl"
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def options(self) -> dict[str, Any]:
        """The options that the run was started with."""
        return self.facts["options"]

    def log(self, **values: Any) -> None:
        """Append one line to `log.jsonl`."""
        with _written(self._log), open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for listener in self.listeners:
            listener(values)

    def record(self, **facts: Any) -> None:
        """Add to `run.yaml`."""
        if any(self.facts.get(name) != value for name, value in facts.items()):
            self.facts.update(facts)
            save_yaml(self.path / "run.yaml", self.facts)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the checkpoint. It remembers the log's length, so that a resumed log has no doubles."""
        length = self._log.stat().st_size if self._log.exists() else 0
        save_tensors(self.path / CHECKPOINT, tensors, {**facts, "log_bytes": length})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint, and the log cut back to it; None if the run never wrote one."""
        file = self.path / CHECKPOINT
        found = load_tensors(file) if file.exists() else None
        if self._log.exists():
            os.truncate(self._log, found[1]["log_bytes"] if found else 0)
        return found

    def finish(self, weights: Mapping[str, Tensor], result: RunResult) -> RunResult:
        """Write the final weights, then mark the run finished; the checkpoint is then removed."""
        save_tensors(result.weights, weights, {"run": self.id, "stage": result.stage})
        plain = {**asdict(result), "path": None, "weights": result.weights.name}
        plain["sites"] = [asdict(site) for site in result.sites]
        plain["warnings"] = list(result.warnings)
        self.facts.update(status="finished", result=plain)
        save_yaml(self.path / "run.yaml", self.facts)
        for file in (
            self.path / CHECKPOINT,
            *self.path.glob(f"{BRANCH}*"),
            *self.path.glob(f"{PIECE}*"),
        ):
            file.unlink(missing_ok=True)
        return result

    def result(self) -> RunResult | None:
        """The result of a run that is finished."""
        return _result(self.path, self.facts)


class Follower(Run):
    """A run as the other processes of a job see it: they read it, and rank 0 alone writes."""

    def log(self, **values: Any) -> None:
        pass

    def record(self, **facts: Any) -> None:
        self.facts.update(facts)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        pass

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        file = self.path / CHECKPOINT
        return load_tensors(file) if file.exists() else None

    def finish(self, weights: Mapping[str, Tensor], result: RunResult) -> RunResult:
        return result


BRANCH = "checkpoint-rank-"
"""How the file begins that another process than rank 0 keeps its own sites in."""

PIECE = "checkpoint-piece-"
"""How a file begins that holds one process's rows of a model in pieces."""


class Branch(Follower):
    """A run as a process sees it that trains sites of its own: a checkpoint of its own, lines for rank 0's log."""

    def __init__(self, path: Path, facts: dict[str, Any], rank: int) -> None:
        super().__init__(path, facts)
        self.lines: list[dict[str, Any]] = []
        self._rank = rank

    def log(self, **values: Any) -> None:
        self.lines.append(values)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        save_tensors(self.path / f"{BRANCH}{self._rank}.safetensors", tensors, facts)


def _result(path: Path, facts: Mapping[str, Any]) -> RunResult | None:
    if facts.get("status") != "finished":
        return None
    plain: dict[str, Any] = dict(facts["result"])
    plain["path"], plain["weights"] = path, path / plain["weights"]
    plain["sites"] = tuple(SiteResult(**site) for site in plain["sites"])
    plain["warnings"] = tuple(plain.get("warnings", ()))
    return RunResult(**plain)


def runs(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The facts (`run.yaml`) of every run of the build at `directory`, by ID, oldest first."""
    home = Path(directory) / "runs"
    found = sorted(p for p in home.glob("[0-9]*-*") if (p / "run.yaml").is_file())
    return {p.name: load_yaml(p / "run.yaml") for p in found}


def latest(directory: str | Path, stage: str) -> str | None:
    """The newest finished run of a stage."""
    done = [
        name
        for name, facts in runs(directory).items()
        if facts.get("status") == "finished" and facts.get("stage") == stage
    ]
    return done[-1] if done else None


def finished(directory: str | Path, run_id: str) -> RunResult:
    """The result of a run. Raises GraftError where there is no such run (G560) or it is not done (G561)."""
    path = _existing(Path(directory), run_id)
    result = _result(path, load_yaml(path / "run.yaml"))
    if result is None:
        fail("G561", f"the run `{run_id}` is not finished", site=str(path), help="resume it first")
    return result


def _existing(directory: Path, run_id: str) -> Path:
    path = directory / "runs" / run_id
    if not (path / "run.yaml").is_file():
        known = list(runs(directory))
        near = nearest(run_id, known)
        fail("G560", f"no run `{run_id}`", site=str(directory / "runs"),
             wanted=", ".join(known) or "there are no runs", found=run_id,
             help=f"write `{near}`" if near else None)  # fmt: skip
    return path


@contextmanager
def open_run(
    build: Build,
    stage: str,
    *,
    options: Mapping[str, Any],
    parent: str | None = None,
    resume: str | None = None,
    sources: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> Generator[Run]:
    """A new run, or the one called `resume` with the options it was started with, locked.

    Of several processes rank 0 makes it and holds the lock for all; they leave it together.
    A new run that is refused before its first line of log leaves no folder behind.
    `sources` (plain data) goes into `run.yaml` as it is; a resumed run keeps the ones it has.

    Raises GraftError: no such run (G560), a run of another stage (G562), another process at work
    in it (G563), options that differ from the run's (G564), targets that changed since (G565).
    """
    if not ranks.first:
        yield _followed(Path(build.path), ranks)
        ranks.barrier()
        return
    home = Path(build.path) / "runs"
    digest = digest_of(build.targets)
    if resume is None:
        path = _new_directory(home, stage)
        facts: dict[str, Any] = {
            "version": VERSION,
            "id": path.name,
            "stage": stage,
            "parent": parent,
            "status": "running",
            "options": dict(options),
            "targets": digest,
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }
        if sources is not None:
            facts["sources"] = _plain(sources)
    else:
        path = _existing(Path(build.path), resume)
        facts = load_yaml(path / "run.yaml")
        _same_run(facts, stage, options, digest, path)
        if sources is not None:
            facts.setdefault("sources", _plain(sources))
    try:
        with _locked(path):
            save_yaml(path / "run.yaml", facts)
            ranks.share([path.name, facts])
            yield Run(path, facts)
            ranks.barrier()
    except GraftError:
        if resume is None and not _has_begun(path):
            shutil.rmtree(path, ignore_errors=True)
        raise


def _has_begun(path: Path) -> bool:
    """Whether there is anything to go on with, or to read."""
    return any((path / name).exists() for name in (CHECKPOINT, "log.jsonl"))


def _followed(directory: Path, ranks: Ranks) -> Run:
    """The run that rank 0 opened. Raises GraftError (G578) where this process does not see its folder."""
    name, facts = ranks.share()
    path = directory / "runs" / name
    if not (path / "run.yaml").is_file():
        fail("G578", f"the run `{name}` is not in this rank's folder", site=str(path),
             wanted="one folder for all ranks of the job, on a file system that all nodes mount",
             found=platform.node())  # fmt: skip
    return Follower(path, facts)


def _same_run(
    facts: Mapping[str, Any], stage: str, options: Mapping[str, Any], digest: str, path: Path
) -> None:
    if facts["stage"] != stage:
        fail("G562", f"the run `{path.name}` is no {stage} run", site=str(path),
             wanted=stage, found=facts["stage"])  # fmt: skip
    for name, value in options.items():
        if value is not None and facts["options"].get(name) != value:
            fail("G564", f"a run is resumed with the options it was started with: `{name}` differs",
                 site=str(path), wanted=repr(facts["options"].get(name)), found=repr(value),
                 help=f"leave `{name}` out, or start a new run")  # fmt: skip
    if facts["targets"] != digest:
        fail("G565", "the targets of the build changed after this run began", site=str(path),
             help="start a new run")  # fmt: skip


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in the types that YAML and JSON share; a path becomes text."""
    return json.loads(json.dumps(data, default=str))


def digest_of(targets: Mapping[str, Any]) -> str:
    """A short hash of targets as plain data."""
    import hashlib

    return hashlib.sha256(json.dumps(targets, sort_keys=True).encode()).hexdigest()[:16]


def _new_directory(home: Path, stage: str) -> Path:
    """`0001-distill`, `0002-finetune`, …: numbered in order of start."""
    while True:
        taken = [int(m.group(1)) for p in home.glob("*") if (m := re.match(r"(\d+)-", p.name))]
        path = home / f"{max(taken, default=0) + 1:04d}-{stage}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue  # another process took the number just now
        except OSError as error:
            fail("G550", f"cannot create `{path}`: {error}", site=str(path))


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """The run's lock, held by the operating system: it ends with the process, however that ends."""
    with _written(path / "lock"):
        file = open(path / "lock", "ab+", buffering=0)  # noqa: SIM115
    try:
        if not _try_lock(file):
            file.seek(0)
            who = file.read().decode().strip() or "another process"
            fail("G563", f"the run `{path.name}` is at work in {who}", site=str(path),
                 help="wait for it, or start a new run")  # fmt: skip
        with _written(path / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        file.close()


@contextmanager
def _written(path: Path) -> Generator[None]:
    """Tell what keeps a file from being written (G550)."""
    try:
        yield
    except OSError as error:
        fail("G550", f"cannot write `{path.name}`: {error}", site=str(path),
             help="free some space, then start or resume")  # fmt: skip


def _try_lock(file: Any) -> bool:
    try:
        if os.name == "nt":
            import msvcrt  # pyright: ignore

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
