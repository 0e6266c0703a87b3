#!/usr/bin/env python3
"""Build a TensorRT engine from model.onnx, or check one against the golden files. It needs tensorrt and numpy.

python build_engine.py [--rtx] [-o model.engine]     build; --rtx: with TensorRT-RTX, which needs no GPU to build
python build_engine.py --check model.engine          run it on the golden inputs (needs a GPU and polygraphy)
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def profiles(root: Path) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Input → its smallest, usual and largest shape, read from the golden cases."""
    import numpy

    cases = json.loads((root / "golden" / "golden.json").read_text())["cases"]
    shapes: dict[str, list[list[int]]] = {}
    usual: dict[str, list[int]] = {}
    for case in cases:
        with numpy.load(
            root / "golden" / case["name"] / "inputs.npz", allow_pickle=False
        ) as arrays:
            for name in arrays.files:
                shapes.setdefault(name, []).append(list(arrays[name].shape))
                if case["name"].startswith("usual"):
                    usual[name] = list(arrays[name].shape)
    return {
        n: ([min(s) for s in zip(*all_, strict=True)], usual[n], [max(s) for s in zip(*all_, strict=True)])
        for n, all_ in shapes.items()
    }  # fmt: skip


def build(trt: Any, model: Path, root: Path) -> tuple[Any, int]:
    """The serialised engine and the number of layers. Raises RuntimeError with the parser's own words."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise RuntimeError(
            "; ".join(f"{e.node_name()}: {e.desc()}" for e in errors)
            or "the parser refused the file"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    known = profiles(root)
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *known[tensor.name])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("the builder made no engine")
    return engine, network.num_layers


def check(path: Path, root: Path) -> tuple[int, list[tuple[str, str, str]]]:
    """Every golden case through the engine: (exit code, name, state and figures of each check).

    0 if all are within the export's tolerance, 1 if not, 3 where the engine cannot run here.
    """
    import numpy

    sys.path.insert(0, str(root))
    verify = importlib.import_module("verify")
    missing = [n for n in ("tensorrt", "polygraphy") if importlib.util.find_spec(n) is None]
    why = f"not installed: {', '.join(missing)}" if missing else verify.no_gpu()
    if why is not None:
        return 3, [("engine", "NOT RUN", why)]
    common = importlib.import_module("polygraphy.backend.common")
    backend = importlib.import_module("polygraphy.backend.trt")
    index = json.loads((root / "golden" / "golden.json").read_text())
    half = index["precision"] != "fp32"
    # TensorRT multiplies float32 in TF32 by default, which has ten bits.
    limit = float(index["tolerance"]) if half else 2e-3
    said: list[tuple[str, str, str]] = []
    engine = backend.EngineFromBytes(common.BytesFromPath(str(path)))
    with backend.TrtRunner(engine) as runner:
        for case in index["cases"]:
            folder = root / "golden" / case["name"]
            arrays: dict[str, Any] = {}
            for kind in ("inputs", "outputs"):
                with numpy.load(folder / f"{kind}.npz", allow_pickle=False) as read:
                    arrays[kind] = {name: read[name] for name in read.files}
            found = runner.infer(arrays["inputs"])
            got = [found[n] for n in case["outputs"]]
            wanted = [arrays["outputs"][n] for n in case["outputs"]]
            value = verify.difference(wanted, got)[int(half)]
            said.append(
                (
                    case["name"],
                    "PASS" if value <= limit else "FAIL",
                    f"{value:.1e} (limit {limit:.0e})",
                )
            )
            if case is index["cases"][0]:
                off = verify.difference([1.1 * a for a in wanted], got)[int(half)]
                state = "PASS" if off > limit else "FAIL"
                said.append(("control: golden outputs a tenth off", state, f"{off:.1e}"))
    return int(any(state == "FAIL" for _, state, _ in said)), said


def main() -> int:
    parser = argparse.ArgumentParser(description="Build a TensorRT engine, or check one.")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "model.engine")
    parser.add_argument(
        "--rtx", action="store_true", help="with TensorRT-RTX (pip install tensorrt-rtx)"
    )
    parser.add_argument("--check", type=Path, metavar="ENGINE")
    parser.add_argument("--json", action="store_true", help="what --check found, as JSON")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the export directory")
    parser.add_argument("--model", type=Path, help="default: ROOT/model.onnx")
    given = parser.parse_args()
    if given.check is not None:
        code, said = check(given.check, given.root)
        if given.json:
            print(json.dumps(said))
        else:
            for case, state, detail in said:
                print(f"{case:36} {state:7}  {detail}")
        return code
    name = "tensorrt_rtx" if given.rtx else "tensorrt"
    try:
        trt = importlib.import_module(name)
    except ImportError:
        print(
            f"NOT RUN: {name} is not installed: pip install {name.replace('_', '-')}",
            file=sys.stderr,
        )
        return 3
    try:
        engine, layers = build(trt, given.model or given.root / "model.onnx", given.root)
    except RuntimeError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    given.output.write_bytes(bytes(engine))
    print(
        f"wrote {given.output}: {layers} layers, {given.output.stat().st_size:,} bytes, {name} {trt.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
