"""What brings a student where it runs, and says what was checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftc.diagnostics import fail
from graftc.loading import as_build, task_inputs
from graftc.verification import keep, keep_export, keep_in_build, keep_in_export, with_trajectory

if TYPE_CHECKING:
    from graftc.deploy.profile import Comparison
    from graftc.emit.build import Build
    from graftc.emit.verify import Verification


def export(
    build: str | Path | Build,
    *,
    to: str = "onnx",
    output: str | Path | None = None,
    run: str | None = None,
    precision: str = "fp32",
    dynamic: str | None = None,
    target: str | None = None,
    opset: str = "auto",
    data: str | Any = None,
    command: str = "",
) -> Path:
    """Write the student for a runtime: a directory with model, manifest and golden files; returns its path.

    `output`: the directory; a name that ends in `.onnx` is one plain file (opset 20, float32), as is
    `DIR/student.onnx` where nothing but `run` is given. `run`: whose weights, by default the latest finished
    run's; "none" for the untrained student. `dynamic`: `batch=1:2:8,…`. `data`: what golden inputs are drawn
    from, by default the DATA that the build was compiled with. `command` is noted in the build, for `report`. Raises GraftError.
    """
    from graftc.deploy.directory import write_export
    from graftc.deploy.request import read_request
    from graftc.emit.onnx import chosen_run, export_onnx

    opened = as_build(build)
    plain = (to, precision, dynamic, target, opset, data) == (
        "onnx",
        "fp32",
        None,
        None,
        "auto",
        None,
    )
    if output is not None and Path(output).suffix == ".onnx" and not plain:
        fail("G669", "one file holds float32 at opset 20 alone", site="-o", found=str(output),
             wanted="a directory", help=f"-o {Path(output).with_suffix('')}")  # fmt: skip
    if plain and (output is None or Path(output).suffix == ".onnx"):
        file = export_onnx(opened, Path(output) if output else None, run=run)
        keep_export(opened, file, command)
        return file
    request = read_request(
        opened.config(), to=to, precision=precision, dynamic=dynamic, target=target, opset=opset
    )
    into = Path(output) if output else opened.path / "exports" / f"{to}-{precision}"
    made = write_export(
        opened, into, request, run=chosen_run(opened, run), inputs=task_inputs(opened, data)
    )
    keep_export(opened, made.path, command)
    return made.path


def verify(
    path: str | Path | Build,
    *,
    onnx: str | Path | None = None,
    data: str | Any = None,
    ep: str = "cpu",
    regions: bool = False,
    tolerance: float | None = None,
    trajectory: int | None = None,
    command: str = "",
) -> Verification:
    """Check an export; every check is PASS, FAIL or NOT RUN (reason).

    What it gave is kept in the build's `verification.yaml`, with the `command`, for `report`; of an export in its own
    manifest, and in its build's where that is at hand, as far as they can be written.

    `path`: an export directory, checked against its golden files, by `ep` and where asked by `regions`; or a
    build, whose `student.onnx` (or `onnx`) is checked against the student. A build's inputs are drawn by the
    Task from `data`, by default the DATA that it was compiled with; without either they are random.
    `trajectory`: as many steps of the Task's sampler, in torch and in ONNX Runtime, for an export whose build is
    at hand.
    """
    from graftc.deploy.directory import Export, is_export
    from graftc.emit.verify import verify as check_file

    if isinstance(path, (str, Path)) and Path(path).is_file():
        folder = Path(path).absolute().parent
        fail("G666", "this is a file: `verify` takes a directory, an export or a build", site=str(path),
             help=f"graftc verify {folder}" if is_export(folder) else "graftc verify DIR --onnx FILE, DIR its build")  # fmt: skip
    if isinstance(path, (str, Path)) and is_export(Path(path)):
        from graftc.deploy.ladder import verify_export

        if onnx is not None or data is not None:
            fail("G666", "--onnx and --data are for a build: an export is checked against its own golden files",
                 site=str(path), help="graftc verify OUT")  # fmt: skip
        opened_export = Export.open(Path(path))
        result = verify_export(opened_export, ep=ep, regions=regions, tolerance=tolerance)
        if trajectory is not None:
            result = with_trajectory(opened_export, result, trajectory)
        keep_in_export(opened_export, result, command)
        keep_in_build(opened_export, result, command)
        return result
    opened = as_build(path)
    if regions or ep != "cpu" or tolerance is not None or trajectory is not None:
        fail("G666", "--ep, --regions, --tolerance and --trajectory are for an export directory", site=str(opened.path),
             help=f"graftc export {opened.path} -o OUT; graftc verify OUT")  # fmt: skip
    result = check_file(opened, Path(onnx) if onnx else None, inputs=task_inputs(opened, data))
    keep(opened, result, command)
    return result


def report(build: str | Path | Build, output: str | Path) -> Path:
    """One HTML file on a build: edit, plan, drawing, cost, errors, curves, samples, checks, commands, versions.

    It holds all that it shows and needs no network. Only what was recorded is shown; what was not reads
    NOT RECORDED or NOT RUN. Returns the file's path. Raises GraftError.
    """
    from graftc.emit.files import read_yaml, write_text
    from graftc.reporting.gather import gather
    from graftc.reporting.page import page

    opened = as_build(build)
    kept = opened.path / "verification.yaml"
    said = read_yaml(kept) if kept.is_file() else None
    exports = opened.path / "exports.yaml"
    facts = gather(opened, said, read_yaml(exports) if exports.is_file() else None)
    write_text(Path(output), page(facts))
    return Path(output)


def bench(
    export: str | Path, *, against: str | Path, regions: bool = False, threads: int = 2
) -> Comparison:
    """Two export directories in ONNX Runtime, in turns on the same machine; where asked, time by region and rule.

    Raises GraftError for what is no export; NotRunError where ONNX Runtime cannot run one of them.
    """
    from graftc.deploy.directory import Export
    from graftc.deploy.profile import bench as measure

    return measure(Export.open(export), Export.open(against), regions=regions, threads=threads)
