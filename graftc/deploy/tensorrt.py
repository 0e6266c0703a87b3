"""TensorRT: whether it has the operators of a graph, and the files that build and check an engine."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graftc.deploy import scripts
from graftc.deploy.golden import Case
from graftc.deploy.request import Request
from graftc.deploy.tensorrt_operators import RESTRICTIONS, SINCE, SOURCE, SUPPORTED
from graftc.diagnostics import Diagnostic, GraftError, Note

_TYPES = {
    ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16", ir.DataType.BFLOAT16: "BF16", ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64", ir.DataType.BOOL: "BOOL", ir.DataType.DOUBLE: "FP32", ir.DataType.UINT8: "UINT8",
}  # fmt: skip


def unsupported(model: ir.Model, version: str | None = None) -> list[tuple[str, str, str]]:
    """What TensorRT's list does not hold: (operator, the node's region and rule, why)."""
    found: list[tuple[str, str, str]] = []
    for node in model.graph.all_nodes():
        why = _why_not(node, version)
        if why is not None:
            rule = node.metadata_props.get("graftc.rule", "")
            region = node.metadata_props.get("graftc.region", str(node.name))
            found.append((node.op_type, f"{region}{f', {rule}' if rule else ''}", why))
    return list(dict.fromkeys(found))


def _why_not(node: ir.Node, version: str | None) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return f"domain {node.domain}"
    types = SUPPORTED.get(node.op_type)
    if types is None:
        return "not in the list"
    since = SINCE.get(node.op_type)
    if version is not None and since is not None and _number(version) < _number(since):
        return f"since TensorRT {since}"
    value = node.outputs[0]
    kind = _TYPES.get(value.dtype) if value.dtype is not None else None
    if kind is not None and kind not in types.split() and kind in ("FP16", "BF16"):
        return f"not in {kind}"
    reduction = node.attributes.get("reduction")
    if (
        node.op_type.startswith("Scatter")
        and reduction is not None
        and reduction.as_string() != "none"
    ):
        return RESTRICTIONS[node.op_type]
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(p) for p in version.split(".") if p.isdecimal())


def check_operators(model: ir.Model, request: Request) -> dict[str, Any]:
    """The rung on operators, as data for the manifest. Raises GraftError, naming site and rule, `--to tensorrt`."""
    target = request.target.name if request.target else ""
    version = target.removeprefix("trt-") if target.startswith("trt-") else None
    found = unsupported(model, version)
    if found and request.to == "tensorrt":
        first = found[0]
        raise GraftError(
            Diagnostic(
                "G668", f"TensorRT has no `{first[0]}` here: {first[2]}", site=first[1],
                notes=tuple(Note(f"`{o}` in {where}: {why}") for o, where, why in found[1:6]),
                help="replace that operator by one whose formulation TensorRT has (docs/export.md)",
            )
        )  # fmt: skip
    listed = [{"operator": o, "where": where, "why": why} for o, where, why in found]
    return {
        "operators": {"state": "FAIL" if found else "PASS", "source": SOURCE, "unsupported": listed}
    }


def write_tensorrt(
    folder: Path, config: Mapping[str, Any], request: Request, cases: Sequence[Case]
) -> None:
    """`trt/`: build.sh (trtexec), build_engine.py (TensorRT's Python), parity.sh (polygraphy)."""
    into = folder / "trt"
    into.mkdir()
    profile = {
        kind: ",".join(f"{n}:{shape}" for n, shape in _shapes(config, request, kind) if shape) for kind in ("min", "opt", "max")
    }  # fmt: skip
    usual = next(c for c in cases if c.name.startswith("usual"))
    loads = ",".join(f"{n}:../golden/{usual.name}/{n}.bin" for n in usual.inputs)
    shapes = ",".join(f"{n}:{s}" for n, s in _shapes(config, request, "opt") if s)
    dynamic = [
        f"--minShapes={profile['min']}",
        f"--optShapes={profile['opt']}",
        f"--maxShapes={profile['max']}",
    ]
    build = [
        "trtexec", "--onnx=../model.onnx", "--saveEngine=model.engine", "--stronglyTyped",
        "--timingCacheFile=timing.cache", "--profilingVerbosity=detailed", "--skipInference",
        *(dynamic if request.ranges else []),
    ]  # fmt: skip
    if request.opset.version >= 23:
        build.append('"${DECOMPOSE[@]}"')
    run = ["trtexec", "--loadEngine=model.engine", f"--loadInputs={loads}", "--dumpProfile", "--separateProfileRun",
           *([f"--shapes={shapes}"] if request.ranges else [])]  # fmt: skip
    _script(into / "build.sh", _BUILD.format(build=_lines(build), run=_lines(run)))
    _script(into / "parity.sh", _PARITY.format(tolerance=_POLYGRAPHY[request.precision]))
    for name in ("build_engine.py", "load_golden.py"):
        shutil.copyfile(Path(scripts.__file__).with_name(name), into / name)


_POLYGRAPHY = {
    "fp32": "--atol 1e-4 --rtol 1e-3",
    "fp16": "--atol 1e-2 --rtol 1e-2",
    "bf16": "--atol 5e-2 --rtol 5e-2",
}

_BUILD = """#!/usr/bin/env bash
# Build the engine with trtexec, then time it on a golden input. Layer names are `region/Op`.
set -euo pipefail
cd "$(dirname "$0")"
# TensorRT 10.14 and later fuse an Attention node; DECOMPOSE=1 takes it apart where that fails.
DECOMPOSE=()
if [ "${{DECOMPOSE_ATTENTION:-0}}" = 1 ]; then DECOMPOSE=(--decomposableAttentions="*"); fi
{build}
if [ "${{1:-}}" = --time ]; then
  {run}
fi
"""

_PARITY = """#!/usr/bin/env bash
# TensorRT against ONNX Runtime on the golden inputs (polygraphy), then the engine against the golden outputs.
set -euo pipefail
cd "$(dirname "$0")"
polygraphy run ../model.onnx --trt --onnxrt --strongly-typed --data-loader-script load_golden.py {tolerance} \\
  --check-error-stat median
python build_engine.py --check model.engine
"""


def _lines(words: Sequence[str]) -> str:
    quoted = [w if w.startswith('"$') else shlex.quote(w) for w in words]
    return " \\\n  ".join(quoted)


def _script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def _shapes(config: Mapping[str, Any], request: Request, kind: str) -> list[tuple[str, str]]:
    """Input → its shape at that end of the profile, `8x4x32x32`; '' for one that is wholly fixed."""
    sizes = {r.name: {"min": r.low, "opt": r.usual, "max": r.high}[kind] for r in request.ranges}
    return [
        (str(p["name"]), "x".join(str(sizes.get(s, s)) for s in p["shape"]) if any(isinstance(s, str) for s in p["shape"]) else "")
        for p in config["inputs"]
    ]  # fmt: skip
