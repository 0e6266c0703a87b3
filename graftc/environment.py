"""What is installed here, what is missing, and what each part would need."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec


def doctor() -> list[dict[str, str]]:
    """Findings in order, each with `what`, `state` (ok, missing, problem) and `detail`.

    >>> doctor()[0]["what"]
    'python'
    """
    findings = [_finding("python", "ok", platform.python_version())]
    findings.append(_torch())
    for name in ("lark", "networkx", "onnx", "onnxscript", "safetensors"):
        findings.append(_package(name, "core: install graftc again"))
    findings.append(_runtime())
    findings += _nvidia()
    findings += _rungs()
    for name, extra in (
        ("accelerate", "train"), ("peft", "train"), ("diffusers", "diffusers"), ("transformers", "transformers"),
        ("matplotlib", "report"), ("pygls", "lsp"), ("tensorboard", "tensorboard"), ("sklearn", "examples"),
    ):  # fmt: skip
        package = "scikit-learn" if name == "sklearn" else name
        findings.append(_package(package, f"pip install 'graftc[{extra}]'"))
    return [*findings, *_kernels()]


def _kernels() -> list[dict[str, str]]:
    """The packages whose kernels are forms of operators on a GPU; nothing else wants them."""
    from graftc.operators.specs import SPECS

    forms: dict[str, list[str]] = {}
    for spec in SPECS.values():
        for form in spec.forms:
            if form.package is not None:
                forms.setdefault(form.package[1], []).append(f"{spec.name}(form = {form.name})")
    return [
        _package(package, f"on a GPU alone, for {', '.join(uses)}: pip install {package}")
        for package, uses in forms.items()
    ]


def _nvidia() -> list[dict[str, str]]:
    """The driver's library, CUDA's and cuDNN's, TensorRT and TensorRT-RTX."""
    found = [
        _library(
            "CUDA driver",
            "libcuda.so.1",
            "a GPU and NVIDIA's driver: ONNX Runtime CUDA and engines need it",
        )
    ]
    found.append(_library("cuDNN", "libcudnn.so.9", "ONNX Runtime's CUDA provider needs cuDNN 9"))
    found.append(
        _package(
            "tensorrt", "TensorRT engines: an NVIDIA GPU and `pip install tensorrt polygraphy`"
        )
    )
    found.append(
        _package(
            "tensorrt-rtx", "parse and build without a GPU: pip install 'graftc[rtx]' (proprietary)"
        )
    )
    return found


def _library(what: str, name: str, need: str) -> dict[str, str]:
    import ctypes

    try:
        ctypes.CDLL(name)
    except OSError:
        return _finding(what, "missing", need)
    return _finding(what, "ok", name)


def _rungs() -> list[dict[str, str]]:
    """What each rung of `graftc verify` would need here."""
    providers = _providers()
    there = [] if isinstance(providers, str) else providers
    driver = _library("", "libcuda.so.1", "")["state"] == "ok"
    engine = _version("tensorrt") is not None and _version("polygraphy") is not None
    needs = [
        ("rung: checker, reference evaluator", _version("onnx") is not None, "pip install onnx"),
        ("rung: ONNX Runtime CPU", "CPUExecutionProvider" in there, "pip install 'graftc[cpu]'"),
        ("rung: ONNX Runtime CUDA", driver and "CUDAExecutionProvider" in there, "a GPU and pip install 'graftc[gpu]'"),
        ("rung: TensorRT-RTX", _version("tensorrt-rtx") is not None, "pip install 'graftc[rtx]'"),
        ("rung: TensorRT engine", driver and engine, "a GPU, tensorrt, polygraphy and OUT/trt/build.sh"),
    ]  # fmt: skip
    return [
        _finding(n, "ok" if ok else "missing", "can run here" if ok else f"NOT RUN: needs {need}")
        for n, ok, need in needs
    ]


def _providers() -> list[str] | str:
    """What ONNX Runtime offers; or why it does not load."""
    if find_spec("onnxruntime") is None:
        return "its module is gone"
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # a half-overwritten installation
        return f"its module does not load: {error}"


def versions() -> dict[str, str]:
    """The versions that a check's result depends on, of the packages that are installed.

    >>> "python" in versions()
    True
    """
    names = ("graftc", "torch", "onnx", "onnxruntime", "onnxruntime-gpu")
    installed = {n: v for n in names if (v := _version(n)) is not None}
    return {**installed, "python": platform.python_version()}


def _finding(what: str, state: str, detail: str) -> dict[str, str]:
    return {"what": what, "state": state, "detail": detail}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(package: str, need: str) -> dict[str, str]:
    version = _version(package)
    return _finding(package, "ok", version) if version else _finding(package, "missing", need)


def _torch() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        return _finding("torch", "ok", f"{torch.__version__}, {torch.cuda.get_device_name(0)}")
    return _finding("torch", "ok", f"{torch.__version__}, no CUDA device")


def _runtime() -> dict[str, str]:
    """Both packages install the same module; whichever came last wins in silence."""
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        return _finding(
            "onnxruntime",
            "problem",
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed and overwrite each other's files; "
            "uninstall both, then install one: graftc[cpu] or graftc[gpu]",
        )
    if not (cpu or gpu):
        return _finding(
            "onnxruntime", "missing", "verify needs it: pip install 'graftc[cpu]' or 'graftc[gpu]'"
        )
    providers = _providers()
    if isinstance(providers, str):
        return _finding("onnxruntime", "problem", f"installed, but {providers}; install it again")
    return _finding(
        "onnxruntime-gpu" if gpu else "onnxruntime",
        "ok",
        f"{gpu or cpu}; providers: {', '.join(providers)}",
    )
