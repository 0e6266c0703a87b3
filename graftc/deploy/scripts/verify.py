#!/usr/bin/env python3
"""Check an exported model against its golden files. It needs numpy, onnx and onnxruntime, nothing else.

    python verify.py [--ep cpu|cuda|tensorrt] [--regions] [--tolerance X] [--json]

Every check is PASS, FAIL or NOT RUN with its reason, and each has a negative control: the same check on a
file that is wrong must fail. Exit code 0: nothing failed; 1: something did, or the files are no export;
3: what was asked for could not run here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
EVALUATOR_LIMIT = 20_000_000  # parameters; the reference evaluator is plain NumPy


class Rung(NamedTuple):
    """One check: its name, PASS, FAIL or NOT RUN, and the figures or the reason."""

    name: str
    state: str
    detail: str
    asked: bool = False


class NoExport(Exception):
    """The directory is no whole export."""


class Export:
    """An export directory: its model, its golden cases, what it says of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "golden" / "golden.json"
        if not index.is_file():
            raise NoExport(
                f"{folder} holds no golden/golden.json: it is no export directory, or not a whole one"
            )
        try:
            self.about: dict[str, Any] = json.loads(index.read_text())
            self.cases: list[dict[str, Any]] = self.about["cases"]
            self.model = folder / self.about["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise NoExport(f"golden/golden.json cannot be read: {error!r}") from error
        for name, digest in self.about["sha256"].items():
            path = folder / name
            if not path.is_file():
                raise NoExport(f"{name} is missing")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise NoExport(
                        f"{name} is not the file that golden/golden.json was written with: "
                        "one of the two is truncated, changed, or of another export"
                    )

    def load(self, case: dict[str, Any], kind: str) -> dict[str, Any]:
        import numpy

        with numpy.load(
            self.folder / "golden" / case["name"] / f"{kind}.npz", allow_pickle=False
        ) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def proto(self, weights: bool = True) -> Any:
        import onnx

        return onnx.load(str(self.model), load_external_data=weights)


def difference(wanted: list[Any], found: list[Any]) -> tuple[float, float]:
    """Largest difference as a share of the largest number, and relative L2; NaN or another shape is infinite."""
    import numpy

    largest = scale = square = energy = 0.0
    for a, b in zip(wanted, found, strict=True):
        a, b = numpy.asarray(a, numpy.float64), numpy.asarray(b, numpy.float64)
        if a.shape != b.shape or not numpy.isfinite(b).all():
            return math.inf, math.inf
        if a.size:
            largest = max(largest, float(numpy.abs(a - b).max()))
            scale = max(scale, float(numpy.abs(a).max()))
            square += float(((a - b) ** 2).sum())
            energy += float((a**2).sum())
    relative = largest / scale if scale else (math.inf if largest else 0.0)
    return relative, math.sqrt(square / energy) if energy else (math.inf if square else 0.0)


class Check:
    """Compares by the export's own measure: fp32 by the largest output, halves by relative L2."""

    def __init__(self, about: dict[str, Any], tolerance: float | None) -> None:
        self.half = about["precision"] != "fp32"
        self.limit = tolerance if tolerance is not None else float(about["tolerance"])
        self.measure = "relative L2" if self.half else "of the largest output"

    def value(self, wanted: list[Any], found: list[Any]) -> float:
        relative, norm = difference(wanted, found)
        return norm if self.half else relative

    def text(self, value: float) -> str:
        return f"{value:.1e} {self.measure} (limit {self.limit:.0e})"


def check_file(export: Export) -> Iterator[Rung]:
    """onnx's checker and strict shape inference; a graph with an operator that is none must be refused."""
    import onnx

    try:
        onnx.checker.check_model(str(export.model), full_check=True)
        onnx.shape_inference.infer_shapes_path(
            str(export.model), str(_scratch() / "inferred.onnx"), strict_mode=True
        )
    except Exception as error:
        yield Rung("onnx checker, strict shapes", "FAIL", first_line(error))
        return
    yield Rung(
        "onnx checker, strict shapes",
        "PASS",
        f"onnx {onnx.__version__}, opset {export.about['opset']}",
    )
    wrong = export.proto(weights=False)
    # Weights as inputs: the checker would miss their data first, and say so in place of what is tried here.
    for weight in wrong.graph.initializer:
        port = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
        wrong.graph.input.append(port)
    del wrong.graph.initializer[:]
    wrong.graph.node[len(wrong.graph.node) // 2].op_type = "NoSuchOperator"
    name = "  control: unknown operator"
    try:
        onnx.checker.check_model(wrong.SerializeToString(), full_check=False)
    except Exception as error:
        seen = "NoSuchOperator" in str(error)
        yield Rung(name, "PASS" if seen else "FAIL", f"refused: {first_line(error)}")
        return
    yield Rung(name, "FAIL", "the checker accepts an operator that does not exist")


_scratches: list[Any] = []


def _scratch() -> Path:
    _scratches.append(tempfile.TemporaryDirectory(prefix="verify-"))
    return Path(_scratches[-1].name)


def runtime_missing() -> str | None:
    """Why ONNX Runtime cannot be imported; None where it can."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            return "onnxruntime is not installed: pip install onnxruntime"
        return f"onnxruntime does not load: {error}"
    except ImportError as error:
        return f"onnxruntime does not load: {first_line(error)}"
    if not hasattr(onnxruntime, "InferenceSession"):
        return "onnxruntime is an empty folder: what is left of an installation; install it again"
    return None


def both_runtimes() -> str:
    """A hint, where both packages are installed: they overwrite each other's files."""
    from importlib import metadata

    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""
    return "; onnxruntime and onnxruntime-gpu are both installed and overwrite each other: keep one"


class NotHere(RuntimeError):
    """This machine or this ONNX Runtime does not have what was asked for."""


class FellBack(RuntimeError):
    """The session is on another provider than was asked for."""


def no_gpu() -> str | None:
    """Why no CUDA device can be used here; None where one can."""
    import ctypes

    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return f"no NVIDIA driver: {name} is missing"
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no device"
    return None


def session(model: str | bytes, ep: str = "cpu", extra: dict[str, Any] | None = None) -> Any:
    """A session on that provider, or an error: ONNX Runtime falls back to the CPU in silence otherwise."""
    import onnxruntime

    wanted = PROVIDERS[ep]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in (extra or {}).items():
        if "." in key:
            options.add_session_config_entry(key, value)
        else:
            setattr(options, key, value)
    there = onnxruntime.get_available_providers()
    if wanted not in there:
        raise NotHere(
            f"this ONNX Runtime has no {wanted}: it has {', '.join(there)}{both_runtimes()}"
        )
    if ep != "cpu" and (why := no_gpu()) is not None:
        raise NotHere(why)
    providers: list[Any] = [wanted]
    if ep == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [(wanted, {"use_tf32": "0"})]  # TF32 has ten bits: float32 would be 1e-3 off
    if ep == "tensorrt":
        providers = [wanted, PROVIDERS["cuda"]]
    made = onnxruntime.InferenceSession(model, options, providers=providers)
    on_provider(made, ep)
    return made


def on_provider(made: Any, ep: str) -> None:
    """Raises FellBack for a session on another provider."""
    found = made.get_providers()[0]
    if found != PROVIDERS[ep]:
        raise FellBack(
            f"asked for {PROVIDERS[ep]}, got {found}: its libraries did not load, or it takes no node"
        )


def control_provider(export: Export, ep: str) -> Rung:
    """A session that is on the CPU, whatever was asked for, must be seen to be."""
    name = "  control: a session on the CPU"
    try:
        on_provider(session(str(export.model)), ep)
    except FellBack as error:
        return Rung(name, "PASS", f"refused: {first_line(error)}")
    except Exception as error:
        return Rung(name, "NOT RUN", first_line(error))
    return Rung(name, "FAIL", f"it is taken for {PROVIDERS[ep]}")


def run(made: Any, inputs: dict[str, Any], names: list[str] | None = None) -> list[Any]:
    used = {i.name for i in made.get_inputs()}
    return made.run(names, {k: v for k, v in inputs.items() if k in used})


def check_runtime(export: Export, check: Check, ep: str) -> Iterator[Rung]:
    """ONNX Runtime against the golden outputs at every corner; then with one weight changed, and outside."""
    asked = ep != "cpu"
    title = f"ONNX Runtime {ep.upper()}"
    if (reason := runtime_missing()) is not None:
        yield Rung(title, "NOT RUN", reason, True)
        return
    import onnxruntime

    if asked:
        yield control_provider(export, ep)
    if ep == "tensorrt" and not check.half:
        check = Check(export.about, max(check.limit, 2e-3))  # TensorRT multiplies float32 in TF32
    try:
        made = session(str(export.model), ep)
    except NotHere as error:
        yield Rung(title, "NOT RUN", str(error), asked)
        return
    except Exception as error:
        if export.about["precision"] == "bf16" and ep == "cpu" and "NOT_IMPLEMENTED" in str(error):
            yield Rung(title, "NOT RUN", f"no bfloat16 kernels on the CPU: {first_line(error)}")
        else:
            yield Rung(title, "FAIL", first_line(error), asked)
        return
    for case in export.cases:
        inputs, wanted = export.load(case, "inputs"), export.load(case, "outputs")
        name = f"{title}, {case['name']}"
        try:
            value = check.value(
                [wanted[n] for n in case["outputs"]], run(made, inputs, case["outputs"])
            )
        except Exception as error:
            yield Rung(name, "FAIL", first_line(error), asked)
            continue
        sizes = ", ".join(f"{k}={v}" for k, v in case["sizes"].items())
        yield Rung(
            name, "PASS" if value <= check.limit else "FAIL", f"{sizes}: {check.text(value)}", asked
        )
    yield Rung(
        f"{title} provider",
        "PASS",
        f"{made.get_providers()[0]}, onnxruntime {onnxruntime.__version__}",
        asked,
    )
    del made
    if ep == "cpu":
        yield check_outside(export)
    yield control_weight(export, check, ep)


def check_outside(export: Export) -> Rung:
    """A size that the export does not take must be refused: not computed, whatever comes out."""
    outside = export.about.get("outside")
    if not outside:
        return Rung(
            "a shape outside",
            "NOT RUN",
            "no size is fixed, and the ranges are proved without an end",
        )
    inputs = export.load(export.cases[0], "inputs")
    inputs[outside["input"]] = _widened(inputs[outside["input"]], outside["axis"], outside["size"])
    made = session(str(export.model))
    what = f"`{outside['input']}` with {outside['size']} at dimension {outside['axis']}"
    try:
        run(made, inputs)
    except Exception as error:
        return Rung("a shape outside", "PASS", f"{what} is refused: {first_line(error)[:120]}")
    return Rung(
        "a shape outside", "FAIL", f"{what} is computed, though the export does not take it"
    )


def _widened(array: Any, axis: int, size: int) -> Any:
    import numpy

    return numpy.take(array, [i % array.shape[axis] for i in range(size)], axis=axis)


def control_weight(export: Export, check: Check, ep: str = "cpu") -> Rung:
    """One weight is changed: the comparison must fail then. Edited sites come first."""
    name = "  control: a weight changed"
    case = export.cases[0]
    inputs, wanted = export.load(case, "inputs"), export.load(case, "outputs")
    still = 0
    for weight, changed in changed_weights(export):
        try:
            value = check.value(
                [wanted[n] for n in case["outputs"]],
                run(session(changed, ep), inputs, case["outputs"]),
            )
        except Exception as error:
            return Rung(name, "FAIL", first_line(error))
        if value > check.limit:
            passed = f"; {still} weights before it move nothing" if still else ""
            return Rung(name, "PASS", f"`{weight}`: {check.text(value)}{passed}")
        still += 1
    return Rung(
        name, "FAIL", f"none of {still} weights moves the output: the golden inputs say nothing"
    )


class Copy:
    """A copy of the model that may be changed, its weights beside it where the export has them so."""

    def __init__(self, export: Export) -> None:
        self.folder = _scratch()
        self.proto = export.proto(weights=False)
        for name in export.about["sha256"]:
            if name.endswith(".data"):
                shutil.copyfile(export.folder / name, self.folder / name)

    def array(self, initializer: Any) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(initializer, base_dir=str(self.folder)).copy()

    def write(self, initializer: Any, array: Any) -> None:
        from onnx import TensorProto, numpy_helper

        if initializer.data_location == TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in initializer.external_data}
            with (self.folder / entry["location"]).open("r+b") as file:
                file.seek(int(entry.get("offset", 0)))
                file.write(array.tobytes())
        else:
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))

    def save(self) -> Path:
        path = self.folder / "changed.onnx"
        path.write_bytes(self.proto.SerializeToString())
        return path


def changed_weights(export: Export, count: int = 10) -> Iterator[tuple[str, str]]:
    """The name of a weight, and a copy of the model with that weight wrong; those of edited sites come first.

    In float32 one number is doubled, in halves, whose tolerance is wider, the whole weight.
    """
    import numpy
    import onnx

    copy = Copy(export)
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    weights = [
        i for i in copy.proto.graph.initializer if i.data_type in floats and math.prod(i.dims) > 1
    ]
    sites = tuple(f"{r['path']}." for r in export.about["regions"] if r["rule"])
    weights.sort(
        key=lambda i: (not (sites and i.name.startswith(sites)), -math.prod(i.dims), i.name)
    )
    step = max(1, len(weights) // count)
    for initializer in [*weights[:3], *weights[3::step]]:
        before = copy.array(initializer)
        wide = before.astype(numpy.float64)
        if export.about["precision"] == "fp32":
            flat = wide.reshape(-1)
            at = int(numpy.abs(flat).argmax())
            flat[at] += max(abs(flat[at]), 1.0)
        else:
            wide = 2 * wide + 0.1 * numpy.abs(wide).max()
        copy.write(initializer, wide.astype(before.dtype))
        yield initializer.name, str(copy.save())
        copy.write(initializer, before)


def check_reference(export: Export, check: Check) -> Iterator[Rung]:
    """onnx's reference evaluator on the smallest case; for bfloat16 it is the only check on a CPU."""
    name = "onnx reference evaluator"
    if export.about["parameters"] > EVALUATOR_LIMIT:
        yield Rung(
            name,
            "NOT RUN",
            f"{export.about['parameters']:,} parameters: it is plain NumPy, for {EVALUATOR_LIMIT:,} at most",
        )
        return
    case = min(export.cases, key=lambda c: math.prod(c["sizes"].values()) if c["sizes"] else 1)
    inputs, wanted = export.load(case, "inputs"), export.load(case, "outputs")

    def value(model: Any) -> float:
        return check.value(
            [wanted[n] for n in case["outputs"]], evaluate(model, inputs, case["outputs"])
        )

    try:
        found = value(export.proto())
    except Exception as error:
        yield Rung(name, "NOT RUN", f"it cannot run this graph: {first_line(error)}")
        return
    yield Rung(
        name, "PASS" if found <= check.limit else "FAIL", f"{case['name']}: {check.text(found)}"
    )
    for weight, changed in changed_weights(export, 4):
        import onnx

        off = value(onnx.load(changed))
        if off > check.limit:
            yield Rung("  control: a weight changed", "PASS", f"`{weight}`: {check.text(off)}")
            return
    yield Rung("  control: a weight changed", "FAIL", "no weight moves what it computes")


def evaluate(model: Any, inputs: dict[str, Any], names: list[str]) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    made = ReferenceEvaluator(model)
    found: Any = made.run(names, {k: v for k, v in inputs.items() if k in made.input_names})
    return list(found)


def check_regions(export: Export, check: Check) -> Iterator[Rung]:
    """Each region's output against the student's; then a changed weight must be found in its own region."""
    case = next((c for c in export.cases if c["regions"]), None)
    if case is None:
        yield Rung(
            "regions", "NOT RUN", "the export kept no outputs of regions: they are too large", True
        )
        return
    runner, how = _region_runner(export)
    if runner is None:
        yield Rung("regions", "NOT RUN", how, True)
        return
    inputs, wanted = export.load(case, "inputs"), export.load(case, "regions")
    values = {
        r["path"]: r["values"]
        for r in export.about["regions"]
        if r["values"] and f"{r['path']}#0" in wanted
    }
    if not values:
        yield Rung(
            "regions",
            "NOT RUN",
            "the graph has no value of any region: all were folded into others",
            True,
        )
        return
    limit = max(check.limit, 1e-4) if not check.half else 5 * check.limit
    found = region_errors(runner(Copy(export)), inputs, wanted, values)
    for path, error in found.items():
        rule = next(r["rule"] for r in export.about["regions"] if r["path"] == path)
        state = "PASS" if error <= limit else "FAIL"
        yield Rung(
            f"region {path}",
            state,
            f"{error:.1e} relative L2{f', {rule}' if rule else ''} ({how})",
            True,
        )
    yield control_region(export, runner, inputs, wanted, values, limit)


def _region_runner(export: Export) -> tuple[Callable[[Any], Callable[..., Any]] | None, str]:
    """How to run a model for values inside of it: ONNX Runtime; for bfloat16 the reference evaluator."""
    if export.about["precision"] == "bf16":
        if export.about["parameters"] > EVALUATOR_LIMIT:
            return (
                None,
                "bfloat16 runs on a CPU only in the reference evaluator, and this model is too large for it",
            )
        return _with_evaluator, "reference evaluator"
    if (reason := runtime_missing()) is not None:
        return None, reason
    return _with_runtime, "ONNX Runtime CPU"


def _with_runtime(copy: Copy) -> Callable[..., Any]:
    def call(inputs: dict[str, Any], names: list[str]) -> list[Any]:
        path = copy.folder / "regions.onnx"
        path.write_bytes(expose(copy.proto, names).SerializeToString())
        return run(session(str(path)), inputs, names)

    return call


def _with_evaluator(copy: Copy) -> Callable[..., Any]:
    def call(inputs: dict[str, Any], names: list[str]) -> list[Any]:
        import onnx

        path = copy.folder / "regions.onnx"
        path.write_bytes(expose(copy.proto, names).SerializeToString())
        return evaluate(onnx.load(str(path)), inputs, names)

    return call


def expose(proto: Any, names: list[str]) -> Any:
    """A copy of the model with more values as outputs."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    known = {v.name: v for v in [*made.graph.value_info, *made.graph.input]}
    there = {o.name for o in made.graph.output}
    for name in names:
        if name not in there:
            made.graph.output.append(
                known.get(name) or onnx.helper.make_empty_tensor_value_info(name)
            )
    return made


def region_errors(
    call: Callable[..., Any],
    inputs: dict[str, Any],
    wanted: dict[str, Any],
    values: dict[str, list[str]],
) -> dict[str, float]:
    """Path → relative L2, in the order in which the regions are computed."""
    import numpy

    names = list(dict.fromkeys(v for found in values.values() for v in found))
    if not names:
        return {}
    got = dict(zip(names, call(inputs, names), strict=True))
    errors: dict[str, float] = {}
    for path, found in values.items():
        arrays = [numpy.asarray(got[v]).astype(numpy.float32) for v in found]
        errors[path] = difference([wanted[f"{path}#{i}"] for i in range(len(found))], arrays)[1]
    return errors


def control_region(
    export: Export,
    runner: Any,
    inputs: dict[str, Any],
    wanted: dict[str, Any],
    values: dict[str, list[str]],
    limit: float,
) -> Rung:
    name = "  control: one region's weight changed"
    copy = Copy(export)
    floats = [
        i
        for i in copy.proto.graph.initializer
        if math.prod(i.dims) > 1 and i.data_type in (1, 10, 16)
    ]
    for initializer in sorted(floats, key=lambda i: -math.prod(i.dims)):
        inside = [p for p in values if initializer.name.startswith(f"{p}.")]
        if not inside:
            continue
        owner = max(inside, key=len)
        array = copy.array(initializer)
        copy.write(initializer, (array.astype("float32") * 2 + 1).astype(array.dtype))
        errors = region_errors(runner(copy), inputs, wanted, values)
        first = next((p for p, e in errors.items() if not e <= limit), None)
        if first == owner:
            return Rung(
                name,
                "PASS",
                f"`{initializer.name}`: the first region that is off is `{owner}`",
                True,
            )
        return Rung(
            name,
            "FAIL",
            f"`{initializer.name}` was changed, and the first that is off is {first}",
            True,
        )
    return Rung(name, "NOT RUN", "no region has a weight of its own")


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:260]}" if lines else type(error).__name__


def verify(
    folder: Path, *, ep: str = "cpu", regions: bool = False, tolerance: float | None = None
) -> list[Rung]:
    """All checks of an export directory. Raises NoExport for what is none."""
    export = Export(folder)
    check = Check(export.about, tolerance)
    rungs = [Rung("files", "PASS", f"{len(export.about['sha256'])} files as they were exported")]
    rungs += check_file(export)
    rungs += check_runtime(export, check, "cpu")
    rungs += check_reference(export, check)
    if regions:
        rungs += check_regions(export, check)
    if ep != "cpu":
        rungs += check_runtime(export, check, ep)
    for scratch in _scratches:
        scratch.cleanup()
    _scratches.clear()
    return rungs


def exit_code(rungs: list[Rung]) -> int:
    if any(r.state == "FAIL" for r in rungs):
        return 1
    return 3 if any(r.state == "NOT RUN" and r.asked for r in rungs) else 0


class _Parser(argparse.ArgumentParser):
    """What it cannot read is exit code 1, as every other fault of what was given."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def tolerated(text: str) -> float:
    """A tolerance as it was typed: a number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def main() -> int:
    parser = _Parser(description="Check an exported model against its golden files.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--ep", choices=sorted(PROVIDERS), default="cpu")
    parser.add_argument(
        "--regions",
        action="store_true",
        help="compare every region, and name the first that is off",
    )
    parser.add_argument("--tolerance", type=tolerated, help="in place of the export's own")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    missing = [n for n in ("numpy", "onnx") if find_spec(n) is None]
    if missing:
        print(f"NOT RUN: pip install {' '.join(missing)}", file=sys.stderr)
        return 3
    try:
        rungs = verify(given.folder, ep=given.ep, regions=given.regions, tolerance=given.tolerance)
    except NoExport as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps([r._asdict() for r in rungs], indent=2))
    else:
        wide = max(len(r.name) for r in rungs)
        for rung in rungs:
            print(f"{rung.name:{wide}}  {rung.state:7}  {rung.detail}")
    return exit_code(rungs)


if __name__ == "__main__":
    sys.exit(main())
