"""A Triton model repository: the exported model behind NVIDIA's server, batched, warmed up on a golden input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from graftc.deploy.request import Request

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64",
          "int32": "TYPE_INT32", "bool": "TYPE_BOOL", "float64": "TYPE_FP64"}  # fmt: skip


def write_triton(
    folder: Path,
    config: Mapping[str, Any],
    request: Request,
    outputs: Sequence[tuple[str, Sequence[int | str]]],
    sample: Mapping[str, Tensor],
) -> None:
    """`triton/student/config.pbtxt`, and the versions' folder with a note of what belongs in it.

    The model is not copied: `triton/install.sh` links it (a repository may lie on another disk).
    """
    root = folder / "triton" / "student"
    (root / "1").mkdir(parents=True)
    engine = request.to == "tensorrt"
    (root / "config.pbtxt").write_text(
        config_pbtxt(config, request, outputs, sample, engine), encoding="utf-8"
    )
    warm = root / "warmup"
    warm.mkdir()
    for name, tensor in sample.items():
        first = tensor[:1] if _batched(config) else tensor
        first.contiguous().numpy().tofile(warm / name)
    name = "trt/model.engine" if engine else "model.onnx"
    how = ": build it with trt/build.sh, on the GPU that it is for" if engine else ""
    script = folder / "triton" / "install.sh"
    script.write_text(
        "#!/usr/bin/env bash\n"
        "# Put the model in its place in this repository; then: tritonserver --model-repository=triton\n"
        'set -euo pipefail\ncd "$(dirname "$0")"\n'
        f'[ -f ../{name} ] || {{ echo "{name} is missing{how}" >&2; exit 1; }}\n'
        f"cp ../{name} student/1/model.{'plan' if engine else 'onnx'}\n"
        + (
            ""
            if engine
            else "if [ -f ../model.onnx.data ]; then cp ../model.onnx.data student/1/; fi\n"
        ),
        encoding="utf-8",
    )
    script.chmod(0o755)


def _batched(config: Mapping[str, Any]) -> bool:
    return all(p["shape"] and p["shape"][0] == "batch" for p in config["inputs"])


def config_pbtxt(
    config: Mapping[str, Any],
    request: Request,
    outputs: Sequence[tuple[str, Sequence[int | str]]],
    sample: Mapping[str, Tensor],
    engine: bool,
) -> str:
    """The server's description of the model; batched by the server where all inputs begin with the batch."""
    batched = _batched(config)
    batch = next((r for r in request.ranges if r.name == "batch"), None)
    limit = batch.high if batched and batch is not None else 0
    inputs = [
        _port(str(p["name"]), _TYPES[str(p["dtype"])], list(p["shape"])[1 if limit else 0 :]) for p in config["inputs"]
    ]  # fmt: skip
    results = [_port(n, "TYPE_FP32", list(shape)[1 if limit else 0 :]) for n, shape in outputs]
    lines = [
        'name: "student"',
        f'backend: "{"tensorrt" if engine else "onnxruntime"}"',
        f"max_batch_size: {limit}",
        f"input [\n{_join(inputs)}\n]",
        f"output [\n{_join(results)}\n]",
    ]
    if limit and batch is not None:
        preferred = sorted({batch.usual, batch.high})
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: {preferred} max_queue_delay_microseconds: 2000 }}"
        )
    lines.append(
        "instance_group [ { count: 1 kind: KIND_GPU } ]"
        if engine
        else "instance_group [ { count: 1 kind: KIND_AUTO } ]"
    )
    warm = [
        f'    inputs {{ key: "{n}" value: {{ data_type: {_TYPES[str(t.dtype).removeprefix("torch.")]} '
        f'dims: {list(t.shape)[1 if limit else 0 :] or [1]} input_data_file: "{n}" }} }}'
        for n, t in sample.items()
    ]
    size = f"    batch_size: {1 if limit else 0}\n"
    lines.append('model_warmup [\n  {\n    name: "golden"\n' + size + "\n".join(warm) + "\n  }\n]")
    return "\n".join(lines) + "\n"


def _port(name: str, kind: str, shape: Sequence[int | str]) -> str:
    dims = [-1 if isinstance(s, str) else int(s) for s in shape]
    if not dims:
        return f'  {{ name: "{name}" data_type: {kind} dims: [ 1 ] reshape: {{ shape: [ ] }} }}'
    return f'  {{ name: "{name}" data_type: {kind} dims: {dims} }}'


def _join(items: Sequence[str]) -> str:
    return ",\n".join(items)
