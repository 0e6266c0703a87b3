"""Whether an ONNX file computes what the student computes: rungs, each PASS, FAIL or NOT RUN."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import graftc.emit.files as files
from graftc.diagnostics import fail
from graftc.emit.build import Build
from graftc.emit.examples import Inputs, random_inputs, tensors_of
from graftc.emit.package import stored_state

State = Literal["PASS", "FAIL", "NOT RUN"]

# By dtype: the largest difference as a share of the largest output; for halves the relative L2 norm.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
_SEED = 20250605
_CONTROLS = 12


@dataclass(frozen=True)
class Rung:
    """One check: its name, how it ended, and the figures or the reason.

    `asked`: whether it is what was asked for, so that NOT RUN is exit code 3.
    """

    name: str
    state: State
    detail: str
    asked: bool = True


@dataclass(frozen=True)
class Verification:
    """All checks of one file. `passed` says that none failed; look at the rungs for what was not run."""

    file: Path
    rungs: tuple[Rung, ...]

    @property
    def passed(self) -> bool:
        return not any(r.state == "FAIL" for r in self.rungs)

    @property
    def not_run(self) -> tuple[Rung, ...]:
        return tuple(r for r in self.rungs if r.state == "NOT RUN")

    @property
    def missed(self) -> tuple[Rung, ...]:
        """What was asked for and not run."""
        return tuple(r for r in self.not_run if r.asked)


@dataclass(frozen=True)
class Difference:
    """Two outputs compared: the largest difference, the largest output, and the relative L2 norm.

    >>> compare([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])]).relative
    0.25
    """

    largest: float
    scale: float
    norm: float

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else math.inf if self.largest else 0.0

    def within(self, dtype: str) -> bool:
        measure = self.norm if dtype in ("float16", "bfloat16") else self.relative
        return measure <= TOLERANCE[dtype]  # false for NaN, as it must be

    def text(self, dtype: str) -> str:
        half = dtype in ("float16", "bfloat16")
        measure = "relative L2" if half else "relative to the largest output"
        return (
            f"max abs {self.largest:.2e}, relative {self.relative:.2e}, L2 {self.norm:.2e} "
            f"(tolerance {TOLERANCE[dtype]:.0e} {measure})"
        )


def compare(wanted: Iterable[Tensor], found: Iterable[Tensor]) -> Difference:
    """The difference of two lists of tensors of the same shapes; NaN anywhere gives NaN."""
    largest = scale = square = total = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return Difference(math.inf, 1.0, math.inf)
        x, y = a.detach().double().cpu(), b.detach().double().cpu()
        delta = (x - y).abs()
        largest = _max(largest, delta)
        scale = _max(scale, x.abs())
        square += float((delta**2).sum())
        total += float((x**2).sum())
    norm = math.sqrt(square / total) if total > 0 else (math.inf if square else 0.0)
    return Difference(largest, scale, norm)


def _max(before: float, values: Tensor) -> float:
    """The larger one, NaN if there is any: Python's `max` would lose it."""
    now = float(values.max()) if values.numel() else 0.0
    return now if math.isnan(now) or now > before else before


def verify(
    build: Build,
    file: Path | None = None,
    *,
    inputs: Inputs | None = None,
    batches: tuple[int, ...] = (1, 2, 3, 5),
) -> Verification:
    """Check an ONNX file against the student it was exported from.

    `inputs`: named inputs for a batch size (a Task's real data); by default seeded random ones. Raises
    GraftError for a file that is missing, damaged, or of another build.
    """
    path = Path(file) if file is not None else build.path / "student.onnx"
    proto = _read(path)
    metadata = {p.key: p.value for p in proto.metadata_props}
    if "graftc.build" not in metadata:
        fail("G651", "this ONNX file was not written by graftc", site=str(path),
             help="export the build again")  # fmt: skip
    if metadata["graftc.build"] != str(build.manifest.get("weights", {}).get("student", "")):
        fail("G652", "this ONNX file is of another build", site=str(path),
             wanted=f"a file exported from {build.path}", help="export this build again")  # fmt: skip
    model = build.student(metadata["graftc.run"] or None)
    config = build.config()
    same = files.state_hash(stored_state(model)[0]) == metadata["graftc.weights"]
    run = metadata["graftc.run"] or "untrained"
    first = Rung("weights", "PASS", f"exported from run `{run}`, whose weights are as they were") if same else (
        Rung("weights", "FAIL", f"run `{run}` has other weights now than when this file was exported")
    )  # fmt: skip
    rungs = [first, check_file(path), *check_runtime(path, model, config, inputs, batches)]
    return Verification(path, tuple(rungs))


def check_file(path: Path) -> Rung:
    """The checker of onnx, with strict shape inference."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        proto = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # several classes, and all mean the same to a reader
        return Rung("onnx checker", "FAIL", _first_line(error))
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return Rung(
        "onnx checker", "PASS", f"opset {opset}, {len(proto.graph.node)} nodes, strict shapes"
    )


def check_runtime(
    path: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    inputs: Inputs | None = None,
    batches: tuple[int, ...] = (1, 2, 3, 5),
) -> list[Rung]:
    """ONNX Runtime on the CPU against `model`, at several batch sizes, with its negative controls."""
    try:
        import onnxruntime
    except ImportError:
        reason = 'onnxruntime is not installed: pip install "graftc[cpu]"'
        names = ("ONNX Runtime, CPU", "negative control")
        if any(_fixed(port) for port in config["inputs"]):
            names = (names[0], "fixed sizes", names[1])
        return [Rung(n, "NOT RUN", reason) for n in names]
    del onnxruntime
    draw = inputs or random_inputs(config, model)
    whose = "given" if inputs else "random"
    dtype = _dtype(model, config)
    if "batch" not in config["facts"]["dynamic"]:
        batches = (int(next(iter(config["inputs"]), {"shape": [1]})["shape"][0]),)
    try:
        session = _session(str(path))
    except Exception as error:  # the runtime's own error classes are not public
        return [Rung("ONNX Runtime, CPU", "FAIL", _first_line(error))]
    rungs: list[Rung] = []
    given: dict[str, Tensor] = {}
    wanted: list[Tensor] = []
    for batch in batches:
        generator = torch.Generator().manual_seed(_SEED + batch)
        given = dict(draw(batch, generator))
        wanted = _torch(model, given)
        name = f"ONNX Runtime, batch {batch}"
        try:
            difference = compare(wanted, _run(session, given))
        except Exception as error:  # the runtime's own error classes are not public
            rungs.append(Rung(name, "FAIL", _first_line(error)))
            continue
        state: State = "PASS" if difference.within(dtype) else "FAIL"
        rungs.append(Rung(name, state, f"{difference.text(dtype)}, {whose} inputs"))
    fixed = _fixed_sizes(session, config, given)
    rungs.extend([fixed] if fixed is not None else [])
    sites = tuple(config.get("provenance", {}))
    rungs.append(_negative_control(path, given, wanted, dtype, sites))
    return rungs


def _fixed_sizes(
    session: Any, config: Mapping[str, Any], given: Mapping[str, Tensor]
) -> Rung | None:
    """What the capture fixed must be refused for its size, not computed; None if no size is fixed.

    Only the runtime's own error on that input's dimensions is a refusal: any other says nothing of it.
    """
    used = {i.name for i in session.get_inputs()}
    for port in config["inputs"]:
        name, sizes = str(port["name"]), _fixed(port)
        if not sizes or name not in used:
            continue
        at = sizes[-1]
        tensor = given[name]
        wrong = {**given, name: torch.cat([tensor, tensor], dim=at)}
        what = f"`{name}` with {wrong[name].shape[at]} in place of {tensor.shape[at]} at dimension {at}"
        try:
            _run(session, wrong)
        except Exception as error:
            if _about_size(error, name):
                return Rung("fixed sizes", "PASS", f"{what} is refused")
            reason = f"{what} raised an error that is not about its size: {_first_line(error)}"
            return Rung("fixed sizes", "FAIL", reason)
        return Rung("fixed sizes", "FAIL", f"{what} is computed, though the capture fixed it")
    return None


def _fixed(port: Mapping[str, Any]) -> list[int]:
    """The dimensions of an input that the capture fixed."""
    return [i for i, size in enumerate(port["shape"]) if not isinstance(size, str)]


def _about_size(error: Exception, name: str) -> bool:
    """`Got invalid dimensions for input: x …`, raised by ONNX Runtime itself."""
    text = str(error)
    return (
        type(error).__module__.partition(".")[0] == "onnxruntime"
        and re.search(r"\bdimensions?\b", text) is not None
        and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
    )


def _negative_control(
    path: Path,
    given: Mapping[str, Tensor],
    wanted: list[Tensor],
    dtype: str,
    sites: tuple[str, ...],
) -> Rung:
    """One number of one weight is changed in the file: the comparison must then fail.

    Weights of edited sites are tried first. Behind gates that are zero (a fresh adaLN-zero block) a weight moves nothing; such weights are
    passed over and counted, for a comparison says nothing of them either.
    """
    import numpy
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(str(path))
    weights = [i for i in proto.graph.initializer if _is_float(i) and math.prod(i.dims) > 1]
    weights.sort(key=lambda i: (-math.prod(i.dims), i.name))
    step = max(1, len(weights) // _CONTROLS)
    still: list[str] = []
    edited = [w for w in weights if w.name.startswith(tuple(f"{s}." for s in sites))]
    for initializer in [*edited[:4], *weights[::step], *weights[-2:]]:
        kept = initializer.SerializeToString()
        values = numpy_helper.to_array(initializer).copy()
        flat = values.reshape(-1)
        scale = float(numpy.abs(flat.astype(numpy.float64)).max()) or 1.0
        at = int(numpy.abs(flat.astype(numpy.float64)).argmax())
        flat[at] = flat[at] + numpy.asarray(scale, flat.dtype)
        initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
        try:
            difference = compare(wanted, _run(_session(proto.SerializeToString()), given))
        except ValueError as error:  # above 2 GB a model cannot be passed in memory
            return Rung("negative control", "NOT RUN", _first_line(error))
        except (
            Exception
        ) as error:  # the runtime's own: the changed file must run as the whole one does
            return Rung("negative control", "FAIL", _first_line(error))
        initializer.ParseFromString(kept)
        if not difference.within(dtype):
            passed = (
                f"; {len(still)} weights tried before it move nothing (zero gates?)"
                if still
                else ""
            )
            detail = f"one number of `{initializer.name}` doubled: {difference.relative:.1e} off, seen{passed}"
            return Rung("negative control", "PASS", detail)
        still.append(initializer.name)
    return Rung(
        "negative control", "FAIL", f"none of {len(still)} weights changes the output: {still[:3]}"
    )


def _is_float(initializer: Any) -> bool:
    from onnx import TensorProto

    return initializer.data_type in (
        TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16
    )  # fmt: skip


def _read(path: Path) -> Any:
    import onnx

    if not path.is_file():
        fail("G650", f"no such file: {path.name}", site=str(path),
             help="write it with `graftc export DIR --to onnx`")  # fmt: skip
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's classes differ between its releases
        fail("G650", f"this is no whole ONNX file: {_first_line(error)}", site=str(path),
             help="export the build again")  # fmt: skip


def _session(model: str | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    used = {i.name for i in session.get_inputs()}
    given = {n: t for n, t in given.items() if n in used}
    ports = [*session.get_inputs(), *session.get_outputs()]
    if any(port.type == "tensor(bfloat16)" for port in ports):
        return _run_on_values(session, given)
    feed = {n: t.numpy() for n, t in given.items()}
    return [torch.from_numpy(a) for a in session.run(None, feed)]


def _run_on_values(session: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    """The same for bfloat16, which NumPy does not have."""
    import onnx
    import onnxruntime

    bfloat16 = int(onnx.TensorProto.BFLOAT16)
    value: Any = onnxruntime.OrtValue
    feed: dict[str, Any] = {}
    for name, tensor in given.items():
        if tensor.dtype == torch.bfloat16:
            bits = tensor.contiguous().view(torch.int16).numpy().view("uint16")
            feed[name] = value.ortvalue_from_numpy_with_onnx_type(bits, bfloat16)
        else:
            feed[name] = value.ortvalue_from_numpy(tensor.contiguous().numpy())
    return [torch.from_dlpack(v).clone() for v in session.run_with_ort_values(None, feed)]


def _torch(model: nn.Module, given: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**given))


def _dtype(model: nn.Module, config: Mapping[str, Any]) -> str:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    found = str(parameter.dtype).removeprefix("torch.") if parameter is not None else ""
    return found if found in TOLERANCE else str(config["facts"]["dtype"])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
