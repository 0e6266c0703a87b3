"""What a verification found, kept with the build; and the rung that needs the build as well as its export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from graftc.diagnostics import fail
from graftc.loading import task_of

if TYPE_CHECKING:
    from graftc.deploy.directory import Export
    from graftc.emit.build import Build
    from graftc.emit.verify import Verification


def keep_in_build(export: Export, result: Verification, command: str) -> None:
    from graftc.emit.build import Build

    folder = Path(str((export.manifest.get("build") or {}).get("path", "")))
    if not (folder / "manifest.yaml").is_file() or not os.access(folder, os.W_OK):
        return
    opened = Build.open(folder)
    if (
        str((opened.manifest.get("weights") or {}).get("student", ""))
        == export.manifest["hashes"]["build"]
    ):
        keep(opened, result, command)


def keep_in_export(export: Export, result: Verification, command: str) -> None:
    """The rungs in the export's own manifest, after what the export itself checked."""
    from graftc.deploy.directory import TRACED
    from graftc.emit.files import write_yaml

    if not os.access(export.path, os.W_OK):
        return
    before = (export.manifest.get("rungs") or {}).get("found", ())  # older exports have none
    own = [r for r in before if r["name"] == TRACED]
    rungs = {"by": command or "graftc verify", "found": [*own, *_rungs(result)]}
    write_yaml(export.path / "manifest.yaml", {**export.manifest, "rungs": rungs})


def _rungs(result: Verification) -> list[dict[str, str]]:
    return [{"name": r.name, "state": r.state, "detail": r.detail} for r in result.rungs]


def keep(build: Build, result: Verification, command: str) -> None:
    from graftc.emit.files import write_yaml
    from graftc.environment import versions

    rungs = _rungs(result)
    said = {"file": str(result.file), "command": command, "versions": versions(), "rungs": rungs}
    write_yaml(build.path / "verification.yaml", said)


def keep_export(build: Build, written: Path, command: str) -> None:
    """Note in the build's `exports.yaml` by which command a file or directory was exported, for `report`."""
    from graftc.emit.files import read_yaml, write_yaml

    if not os.access(build.path, os.W_OK):
        return
    kept = build.path / "exports.yaml"
    known = read_yaml(kept) if kept.is_file() else {}
    write_yaml(kept, {**known, str(written): {"command": command}})


def with_trajectory(export: Export, result: Verification, steps: int) -> Verification:
    from graftc.deploy.trajectory import check_trajectory
    from graftc.emit.build import Build
    from graftc.emit.verify import Rung, Verification

    if steps < 1:
        fail("G663", "a trajectory has one step at least", site="--trajectory", found=str(steps))
    said = export.manifest.get("build") or {}
    folder = Path(str(said.get("path", "")))
    if not (folder / "manifest.yaml").is_file():
        rung = Rung("trajectory", "NOT RUN", f"the build that was exported is not at {folder}")
        return Verification(result.file, (*result.rungs, rung))
    opened = Build.open(folder)
    if (
        str(opened.manifest.get("weights", {}).get("student", ""))
        != export.manifest["hashes"]["build"]
    ):
        fail(
            "G652",
            "the build is another one than was exported",
            site=str(folder),
            help="export it again",
        )
    run = None if said["run"] == "untrained" else str(said["run"])
    rungs = check_trajectory(export, opened.student(run), task_of(opened, None), steps)
    return Verification(result.file, (*result.rungs, *rungs))
