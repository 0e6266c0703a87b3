"""The ladder of an export: everything that can be checked here, from the checker to an engine.

What `verify.py` checks without graftc, and then TensorRT's operator list, TensorRT-RTX, and an engine. Each
rung is PASS, FAIL or NOT RUN with its reason, and has a control that must fail.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir

from graftc.deploy import scripts
from graftc.deploy.directory import Export
from graftc.deploy.scripts import verify as standalone
from graftc.deploy.tensorrt import unsupported
from graftc.deploy.tensorrt_operators import SOURCE
from graftc.diagnostics import fail
from graftc.emit.verify import Rung, State, Verification

PROVIDERS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
_SECONDS = 1800


def verify_export(
    export: Export, *, ep: str = "cpu", regions: bool = False, tolerance: float | None = None
) -> Verification:
    """All rungs. `ep`: one of `PROVIDERS`; a rung that was so asked for and could not run is exit code 3.

    Raises GraftError for files that are missing, truncated or of another export.
    """
    if ep not in PROVIDERS:
        fail(
            "G661",
            f"no such execution provider: {ep}",
            site="--ep",
            wanted=", ".join(PROVIDERS),
            found=ep,
        )
    if tolerance is not None and not 0 < tolerance < math.inf:
        fail("G676", f"{tolerance} is no tolerance", site="--tolerance", wanted="a number above 0, such as 1e-5",
             found=str(tolerance))  # fmt: skip
    runtime = ep if ep in standalone.PROVIDERS else "cpu"
    try:
        found = standalone.verify(export.path, ep=runtime, regions=regions, tolerance=tolerance)
    except standalone.NoExport as error:
        fail("G667", str(error), site=str(export.path), help="export the build again")
    rungs = [Rung(r.name, r.state, r.detail, r.asked) for r in found]  # pyright: ignore[reportArgumentType]
    rungs += _operators(export)
    rungs += _rtx(export, asked=ep == "tensorrt-rtx")
    rungs += _engine(export, asked=ep == "tensorrt")
    return Verification(export.model, tuple(rungs))


def _operators(export: Export) -> list[Rung]:
    """TensorRT's published list against the graph; a graph with an operator outside of it must be named."""
    model = ir.load(export.model)
    target = str(export.manifest.get("target", ""))
    version = target.removeprefix("trt-") if target.startswith("trt-") else None
    found = unsupported(model, version)
    name = "TensorRT operators"
    rungs: list[Rung] = []
    if found:
        first = "; ".join(f"`{o}` in {where}: {why}" for o, where, why in found[:3])
        rungs.append(Rung(name, "FAIL", first, False))
    else:
        kinds = len({n.op_type for n in model.graph})
        rungs.append(Rung(name, "PASS", f"{kinds} kinds, all in {SOURCE}", False))
    node = next(iter(model.graph))
    node.op_type = "Det"
    seen = any(o == "Det" for o, _, _ in unsupported(model, version))
    rungs.append(
        Rung("  control: an operator that it lacks", "PASS" if seen else "FAIL",
             "`Det` is named" if seen else "`Det` is not named", False)
    )  # fmt: skip
    return rungs


def _rtx(export: Export, *, asked: bool) -> list[Rung]:
    """TensorRT-RTX parses and builds without a GPU. It is not TensorRT: what it shows is its own."""
    name = "TensorRT-RTX parse and build"
    if find_spec("tensorrt_rtx") is None:
        return [
            Rung(name, "NOT RUN", 'tensorrt-rtx is not installed: pip install "graftc[rtx]"', asked)
        ]
    with tempfile.TemporaryDirectory(prefix="graftc-rtx-") as folder:
        state, said = _build(export, Path(folder), export.model)
        rungs = [Rung(name, state, said, asked)]
        model = ir.load(export.model)
        next(iter(model.graph)).op_type = "NoSuchOperator"
        wrong = Path(folder) / "wrong.onnx"
        ir.save(model, wrong, external_data="wrong.data")
        state, said = _build(export, Path(folder), wrong)
        refused = state == "FAIL"
        rungs.append(
            Rung(
                "  control: unknown operator",
                "PASS" if refused else "FAIL",
                f"refused: {said}" if refused else said,
                asked,
            )
        )
    return rungs  # fmt: skip


def _build(export: Export, folder: Path, model: Path) -> tuple[State, str]:
    """In a process of its own: a parser that crashes takes nothing with it."""
    script = Path(scripts.__file__).with_name("build_engine.py")
    command = [sys.executable, str(script), "--rtx", "--root", str(export.path), "--model", str(model),
               "-o", str(folder / "model.engine")]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "NOT RUN", f"stopped after {_SECONDS} s"
    lines = [
        t
        for t in (done.stdout + "\n" + done.stderr).splitlines()
        if t.startswith(("wrote", "FAIL", "NOT RUN"))
    ]
    said = lines[-1].partition(": ")[2][:200] if lines else f"it ended with code {done.returncode}"
    return ("PASS" if done.returncode == 0 else "NOT RUN" if done.returncode == 3 else "FAIL"), said


def _engine(export: Export, *, asked: bool) -> list[Rung]:
    """An engine against the golden files: the script that the export carries, where there are GPU and TensorRT."""
    name = "TensorRT engine, golden files"
    engine = export.path / "trt" / "model.engine"
    if not (export.path / "trt").is_dir():
        return [Rung(name, "NOT RUN", "exported without `--to tensorrt`", asked)]
    if not engine.is_file():
        return [
            Rung(
                name,
                "NOT RUN",
                "no engine: run trt/build.sh on a machine with the GPU that it is for",
                asked,
            )
        ]
    script = export.path / "trt" / "build_engine.py"
    command = [sys.executable, str(script), "--check", str(engine), "--json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [Rung(name, "NOT RUN", f"stopped after {_SECONDS} s", asked)]
    try:
        found: list[tuple[str, State, str]] = [(n, s, d) for n, s, d in json.loads(done.stdout)]
    except ValueError:  # the runtime ended the process: a traceback, or a crash
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Rung(name, "FAIL", last[:200], asked)]
    if done.returncode == 3:
        return [Rung(name, "NOT RUN", found[0][2], asked)]
    return [
        Rung(f"  {case}" if case.startswith("control") else f"{name}, {case}", state, detail, asked)
        for case, state, detail in found
    ]
