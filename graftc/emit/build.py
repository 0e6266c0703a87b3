"""The build directory: student, teacher, targets, plan and manifest, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftc.emit.files as files
from graftc.diagnostics import fail
from graftc.emit.loop_example import EXAMPLE
from graftc.emit.package import State, load_package, stored_state, write_package
from graftc.program.program import Program

FORMAT = 1
_FILES = ("manifest.yaml", "plan.yaml", "targets.yaml")


@dataclass(frozen=True)
class RunInfo:
    """A run of `distill` or `finetune` on a build: its folder's name, and what its `run.yaml` says."""

    id: str
    path: Path
    info: Mapping[str, Any]

    @property
    def stage(self) -> str:
        return str(self.info.get("stage", ""))

    @property
    def finished(self) -> bool:
        """Whether the run is done, and trained the student (a baseline may train the teacher)."""
        return self.info.get("status", "finished") == "finished" and self.weights.is_file()

    @property
    def weights(self) -> Path:
        return self.path / "student.safetensors"


@dataclass(frozen=True)
class Build:
    """A build on disk. It is immutable; runs are written beside it, under `runs/`."""

    path: Path
    manifest: Mapping[str, Any]
    plan: Mapping[str, Any]
    targets: Mapping[str, Any]

    @staticmethod
    def open(path: Path | str) -> Build:
        """Raises GraftError for what is no build, one of another version, or one with a file missing."""
        folder = Path(path)
        if not folder.is_dir():
            fail("G630", f"no such build: {folder}", site=str(folder),
                 help="write one with `graftc compile FILE -m MODEL -o DIR`")  # fmt: skip
        if not (folder / "manifest.yaml").is_file():
            fail("G630", "this directory is no build", site=str(folder),
                 wanted="a directory with `manifest.yaml`, written by `graftc compile`")  # fmt: skip
        manifest = files.read_yaml(folder / "manifest.yaml")
        if "graftc_export" in manifest:
            fail("G630", "this directory is an export, no build", site=str(folder), wanted="the build that was exported",
                 found=str((manifest.get("build") or {}).get("path", "")) or None)  # fmt: skip
        if manifest.get("graftc_build") != FORMAT:
            fail("G631", "this build was written by another version of graftc", site=str(folder),
                 wanted=f"graftc_build: {FORMAT}", found=str(manifest.get("graftc_build")),
                 help="compile again with this version")  # fmt: skip
        for part in ("student", "teacher"):
            for name in ("model.py", "config.yaml"):
                if not (folder / part / name).is_file():
                    fail("G612", f"`{part}/{name}` is missing", site=str(folder),
                         help="compile again")  # fmt: skip
        plan = files.read_yaml(folder / "plan.yaml")
        targets = files.read_yaml(folder / "targets.yaml")
        return Build(folder, manifest, plan, targets)

    def config(self, part: str = "student") -> dict[str, Any]:
        """`config.yaml` of `student` or `teacher`: inputs, outputs, facts."""
        return files.read_yaml(self.path / part / "config.yaml")

    def teacher(self, state: State | Callable[[], State | nn.Module] | None = None) -> nn.Module:
        """The teacher. Where the build only links its weights, `state` or else MODEL itself gives them."""
        linked = self.config("teacher")["weights"]
        if state is None and linked.get("model"):
            from graftc.program.model import load_model

            state = load_model(str(linked["model"]), weights=linked.get("from")).module
        return load_package(self.path / "teacher", state=state)

    def student(self, run: str | None = None) -> nn.Module:
        """The student as compiled, or as a run left it."""
        if run is None:
            return load_package(self.path / "student")
        return load_package(self.path / "student", self.run(run).weights)

    def candidate(self, package: str) -> nn.Module:
        """A candidate of `one of` that is not in the student, with its first weights."""
        return load_package(self.path / package)

    def run(self, id: str) -> RunInfo:
        """Raises GraftError, with the runs that there are, for an unknown one."""
        known = {r.id: r for r in self.runs()}
        if id not in known:
            fail("G632", f"this build has no run `{id}`", site=str(self.path),
                 wanted=", ".join(known) or "a run: `graftc distill DIR -d DATA` makes one")  # fmt: skip
        return known[id]

    def runs(self) -> list[RunInfo]:
        """The runs with a `run.yaml`, in the order of their names."""
        folders = sorted((self.path / "runs").glob("*/run.yaml"))
        return [RunInfo(f.parent.name, f.parent, files.read_yaml(f)) for f in folders]

    def latest_run(self, stage: str | None = None) -> RunInfo | None:
        """The last finished run of the student (of a stage): runs are numbered as they start."""
        done = [r for r in self.runs() if r.finished and stage in (None, r.stage)]
        return done[-1] if done else None


def write_build(
    directory: Path | str,
    *,
    student: Program,
    teacher: Program,
    plan: Mapping[str, Any],
    targets: Mapping[str, Any],
    manifest: Mapping[str, Any],
    copy_teacher: bool = False,
    candidates: Mapping[str, Program] | None = None,
    provenance: Mapping[str, str] | None = None,
    model: str = "",
    model_weights: str = "",
    made_by: str = "",
    drop_runs: bool = False,
) -> Build:
    """Write a build; an older one in `directory` is replaced only by a whole new one.

    `candidates`: folder in the build → a model to write there as a package (what `one of` did not choose).
    `model`: the MODEL reference, by which a teacher that is not copied is found again, `model_weights` the file
    or folder that its weights were read from, where that was another. Runs of an
    older build are kept if its student is the very same; runs of another student are dropped only
    with `drop_runs`. Raises GraftError, and leaves the disk as it was, if there are such runs, if
    `directory` is no build, or if it cannot be written.
    """
    folder = Path(directory)
    with files.whole_directory(folder, ours=_is_build) as partial:
        config = write_package(student, partial / "student", provenance=provenance, made_by=made_by)
        about_teacher = write_package(
            teacher, partial / "teacher", made_by="The normalised teacher",
            weights="copy" if copy_teacher else "link", link=model, linked_weights=model_weights,
        )  # fmt: skip
        for path, candidate in (candidates or {}).items():
            write_package(candidate, partial / path, made_by=made_by)
        files.write_yaml(partial / "plan.yaml", plan)
        files.write_yaml(partial / "targets.yaml", targets)
        if targets.get("sites"):
            files.write_text(partial / "distill_example.py", EXAMPLE)
        said = {
            "graftc_build": FORMAT,
            **manifest,
            "inputs": config["inputs"],
            "outputs": config["outputs"],
            "facts": config["facts"],
            "weights": {
                "student": config["weights"]["sha256"],
                "teacher": about_teacher["weights"]["sha256"],
            },
            "versions": {**config["versions"], **dict(manifest.get("versions", {}))},
        }
        files.write_yaml(
            partial / "manifest.yaml", said
        )  # last: its presence says that all is there
        if not drop_runs:
            _keep_runs(folder, partial)
    return Build.open(folder)


def _is_build(folder: Path) -> bool:
    manifest = folder / "manifest.yaml"
    return manifest.is_file() and "graftc_build" in manifest.read_text(errors="replace")


def _keep_runs(old: Path, new: Path) -> None:
    """Take the runs of an older build along, by hard links, so that the older one stays whole."""
    runs = old / "runs"
    if not runs.is_dir() or not any(runs.iterdir()):
        return
    same = all(
        (old / "student" / n).is_file()
        and (old / "student" / n).read_bytes() == (new / "student" / n).read_bytes()
        for n in ("model.py", "model.safetensors")
    )
    if not same:
        fail("G613", "the build holds runs of another student, which would be lost",
             site=str(runs), found=", ".join(sorted(r.name for r in runs.iterdir()))[:200],
             help="write to another directory, or remove this one yourself")  # fmt: skip
    shutil.copytree(runs, new / "runs", copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a run's `student.safetensors`: the state dict, each shared tensor once."""
    stored, _ = stored_state(module)
    names = set(module.state_dict())
    return {n: t for n, t in stored.items() if n in names}
