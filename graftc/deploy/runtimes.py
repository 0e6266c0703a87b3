"""What each target runtime takes: opsets, the file format's version, and where that is known from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from graftc.diagnostics import fail, nearest

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")

# The share of the largest output (fp32), or the relative L2 norm (halves).
TOLERANCE: Mapping[str, float] = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}

LOWEST, HIGHEST = 18, 23
"""The opsets that torch's dynamo exporter writes and graftc's tests run."""


@dataclass(frozen=True)
class Runtime:
    """A version of a runtime: the highest opset and IR version it takes, and whether it has `Attention`."""

    name: str
    opset: int
    ir: int
    attention: bool
    source: str


_MEASURED = "measured: benchmarks/opsets.py loads a file of each opset in that release"
_TABLE = "onnx-tensorrt docs/operators.md of that release"

RUNTIMES: Mapping[str, Runtime] = {
    r.name: r
    for r in (
        Runtime("ort-1.20", 21, 10, False, _MEASURED),
        Runtime("ort-1.21", 22, 10, False, _MEASURED),
        Runtime("ort-1.22", 22, 10, False, _MEASURED),
        Runtime("ort-1.23", 23, 11, True, _MEASURED),
        Runtime("trt-10.9", 22, 10, False, "ONNX 1.17, opsets 9 to 22: onnx-tensorrt of 10.9"),
        Runtime("trt-10.14", 23, 11, True, "Attention is imported from TensorRT 10.14 on"),
        Runtime("trt-10.15", 24, 12, True, _TABLE),
        Runtime("trt-11.0", 24, 12, True, "NVIDIA's ONNX opset guide for 11.x, operators.md"),
        Runtime("triton-25.04", 21, 10, False, "TensorRT 10.9, CUDA 12.9; opset 21 runs in both of its backends"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Opset:
    """The opset, and the sentence that says why; `chosen` here, or asked for."""

    version: int
    why: str
    chosen: bool = True


def runtime(name: str | None) -> Runtime | None:
    """The runtime of that name. Raises GraftError, with the known ones, for another.

    >>> runtime("ort-1.20").opset
    21
    """
    if name is None:
        return None
    if name not in RUNTIMES:
        near = nearest(name, RUNTIMES)
        fail("G661", f"no such target: {name}", site="--target", wanted=", ".join(RUNTIMES), found=name,
             help=f"write `{near}`" if near else None)  # fmt: skip
    return RUNTIMES[name]


def choose_opset(requested: str, precision: Precision, target: Runtime | None, to: str) -> Opset:
    """The opset that was asked for, or the one that fits precision and target; refused where it cannot be.

    >>> choose_opset("auto", "fp32", None, "onnx").version
    20
    >>> choose_opset("auto", "bf16", RUNTIMES["trt-10.15"], "tensorrt").version
    23
    """
    if requested != "auto":
        if not requested.isdecimal() or not LOWEST <= int(requested) <= HIGHEST:
            fail(
                "G662",
                f"the opset is `auto` or {LOWEST} to {HIGHEST}",
                site="--opset",
                found=requested,
            )
        version = int(requested)
        if target is not None and version > target.opset:
            fail("G662", f"{target.name} takes opsets up to {target.opset}", site="--opset", found=requested,
                 help=f"--opset {target.opset}, or another --target ({target.source})")  # fmt: skip
        if precision == "bf16" and version < 22:
            fail("G662", "bfloat16 convolutions and attention need opset 22 or above", site="--opset", found=requested,
                 help="--opset auto")  # fmt: skip
        return Opset(version, "asked for", chosen=False)
    if precision == "fp32":
        return Opset(20, "the oldest with Gelu: every runtime since ONNX Runtime 1.17 takes it")
    if target is None or target.attention:
        return Opset(23, f"{precision}: one Attention node each, softmax statistics in float32")
    if precision == "bf16":
        if target.opset < 22:
            fail("G662", f"{target.name} takes opsets up to {target.opset}; bfloat16 needs 22", site="--precision",
                 found="bf16", help="--precision fp16, or a later --target")  # fmt: skip
        return Opset(
            22, f"{target.name} has no Attention node; 22 is the first with bfloat16 convolutions"
        )
    return Opset(20, f"{target.name} has no Attention node")
