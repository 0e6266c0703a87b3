"""The rungs that need a GPU, with a provider and an engine that are made up: each must be able to fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest

from graftc.deploy.directory import Export
from graftc.deploy.ladder import verify_export
from graftc.deploy.scripts import verify as standalone
from tests.deploy.test_export import run, states

CUDA = "CUDAExecutionProvider"
CPU_SESSION = onnxruntime.InferenceSession


class Fake:
    """ONNX Runtime on the CPU that calls itself what `names` says, and multiplies what it computes by `factor`."""

    names: tuple[str, ...] = (CUDA, "CPUExecutionProvider")
    factor = 1.0
    asked: list[Any]

    def __init__(self, model: Any, options: Any, providers: list[Any]) -> None:
        self.made = CPU_SESSION(model, providers=["CPUExecutionProvider"])
        self.on_cuda = not (len(providers) == 1 and providers[0] == "CPUExecutionProvider")
        type(self).asked.append((providers, options))

    def get_providers(self) -> list[str]:
        return list(self.names) if self.on_cuda else self.made.get_providers()

    def get_inputs(self) -> Any:
        return self.made.get_inputs()

    def run(self, names: Any, feed: Any) -> Any:
        factor = self.factor if self.on_cuda else 1.0
        return [factor * a for a in self.made.run(names, feed)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A machine that says it has a GPU; `gpu(names, factor)` is what its ONNX Runtime does."""

    def make(names: tuple[str, ...] = Fake.names, factor: float = 1.0) -> type[Fake]:
        kind = type("Session", (Fake,), {"names": names, "factor": factor, "asked": []})
        monkeypatch.setattr(onnxruntime, "InferenceSession", kind)
        return kind

    there = [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(standalone, "no_gpu", lambda: None)
    return make


def cuda(folder: Path) -> dict[str, tuple[str, str]]:
    """What the CUDA rung says, as `verify.py` gives it."""
    export = standalone.Export(folder)
    check = standalone.Check(export.about, None)
    return {r.name: (r.state, r.detail) for r in standalone.check_runtime(export, check, "cuda")}


def test_a_session_that_fell_back_to_the_cpu_in_silence_fails(exported, gpu):
    gpu(names=("CPUExecutionProvider",))
    found = cuda(exported("fp32").path)
    assert found["ONNX Runtime CUDA"][0] == "FAIL"
    assert "got CPUExecutionProvider" in found["ONNX Runtime CUDA"][1]
    assert not [n for n in found if "usual" in n]  # nothing is compared on the wrong provider


def test_the_provider_is_asserted_and_the_fallback_off(exported, gpu):
    made = gpu()
    found = cuda(exported("fp32").path)
    assert {state for state, _ in found.values()} == {"PASS"}, found
    assert "refused" in found["  control: a session on the CPU"][1]
    assert "  control: a weight changed" in found
    providers, options = next((p, o) for p, o in made.asked if p != ["CPUExecutionProvider"])
    assert providers == [(CUDA, {"use_tf32": "0"})]
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_a_provider_that_computes_something_else_fails(exported, gpu):
    gpu(factor=1.001)
    found = cuda(exported("fp32").path)
    assert found["ONNX Runtime CUDA, usual-0"][0] == "FAIL"


def test_a_golden_file_that_is_off_fails(copy, gpu):
    gpu()
    rehash(copy, "golden/odd/outputs.npz", lambda arrays: {k: 1.01 * v for k, v in arrays.items()})
    found = cuda(copy)
    assert found["ONNX Runtime CUDA, odd"][0] == "FAIL"
    assert found["ONNX Runtime CUDA, usual-0"][0] == "PASS"


def rehash(folder: Path, name: str, change) -> None:
    """Change a golden file, and make the recorded hash fit: what only a comparison can find."""
    import hashlib

    with numpy.load(folder / name) as arrays:
        changed = change({k: arrays[k] for k in arrays.files})
    numpy.savez(folder / name, allow_pickle=False, **changed)
    index = json.loads((folder / "golden/golden.json").read_text())
    index["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "golden/golden.json").write_text(json.dumps(index))


def test_a_machine_without_a_driver_does_not_run_it(exported, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(standalone, "no_gpu", lambda: "no NVIDIA driver: libcuda.so.1 is missing")
    found = cuda(exported("fp32").path)
    assert found["ONNX Runtime CUDA"] == ("NOT RUN", "no NVIDIA driver: libcuda.so.1 is missing")
    assert found["  control: a session on the CPU"][0] == "PASS"


# An engine: TensorRT, polygraphy and the driver are stubs; the script and the golden files are the real ones.
STUBS = {
    "sitecustomize.py": """
import ctypes
class Driver:
    def __init__(self, name): pass
    def cuInit(self, flags): return 0
    def cuDeviceGetCount(self, count): count._obj.value = 1; return 0
real = ctypes.CDLL
ctypes.CDLL = lambda name, *a, **k: Driver(name) if name == "libcuda.so.1" else real(name, *a, **k)
""",
    "tensorrt/__init__.py": "",
    "polygraphy/__init__.py": "",
    "polygraphy/backend/__init__.py": "",
    "polygraphy/backend/common/__init__.py": """
def BytesFromPath(path): return open(path, "rb").read()
""",
    "polygraphy/backend/trt/__init__.py": """
import onnxruntime
def EngineFromBytes(data):
    if not data.endswith(b".onnx"): raise RuntimeError("the engine was built by another TensorRT")
    return data.decode()
class TrtRunner:
    def __init__(self, engine): self.engine = engine
    def __enter__(self):
        self.made = onnxruntime.InferenceSession(self.engine, providers=["CPUExecutionProvider"]); return self
    def __exit__(self, *_): pass
    def infer(self, feed):
        return dict(zip([o.name for o in self.made.get_outputs()], self.made.run(None, feed)))
""",
}


@pytest.fixture
def engine(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in STUBS.items():
        path = tmp_path / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))
    (copy / "trt/model.engine").write_text(str(copy / "model.onnx"))
    return copy


def engine_rungs(folder: Path) -> dict[str, tuple[str, str]]:
    from graftc.deploy.ladder import _engine

    return {r.name: (r.state, r.detail) for r in _engine(Export.open(folder), asked=True)}


def test_an_engine_is_compared_with_every_golden_case(engine):
    found = engine_rungs(engine)
    assert {state for state, _ in found.values()} == {"PASS"}, found
    assert "TensorRT engine, golden files, odd" in found
    assert "  control: golden outputs a tenth off" in found


def test_an_engine_that_differs_from_a_golden_file_fails(engine):
    rehash(engine, "golden/odd/outputs.npz", lambda arrays: {k: v + 1 for k, v in arrays.items()})
    found = engine_rungs(engine)
    assert found["TensorRT engine, golden files, odd"][0] == "FAIL"
    assert found["TensorRT engine, golden files, usual-0"][0] == "PASS"


def test_an_engine_that_does_not_load_fails_with_the_runtimes_words(engine):
    (engine / "trt/model.engine").write_text("of another version")
    (found,) = engine_rungs(engine).values()
    assert found[0] == "FAIL"
    assert "another TensorRT" in found[1]


def test_an_engine_without_tensorrt_is_not_run(copy):
    (copy / "trt/model.engine").write_text("")
    (found,) = engine_rungs(copy).values()
    assert found[0] == "NOT RUN"
    assert "tensorrt" in found[1]


def test_a_failed_rung_is_exit_1(copy, gpu, capsys):
    gpu(names=("CPUExecutionProvider",))
    assert run("verify", str(copy), "--ep", "cuda") == 1
    assert "got CPUExecutionProvider" in capsys.readouterr().out


def test_no_onnxruntime_is_not_run_and_exit_3(exported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = verify_export(exported("fp32"), regions=True)
    assert states(result, "ONNX Runtime CPU") == {"ONNX Runtime CPU": "NOT RUN"}
    assert states(result, "reference", "checker", "files")["onnx reference evaluator"] == "PASS"
    assert states(result, "regions") == {"regions": "NOT RUN"}
    assert run("verify", str(exported("fp32").path)) == 3
    assert "onnxruntime is not installed" in capsys.readouterr().out.replace("\n", " ")
