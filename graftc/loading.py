"""What a user names, as the value: MODEL, DATA, TASK, a build."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftc.diagnostics import fail

if TYPE_CHECKING:
    from graftc.emit.build import Build
    from graftc.operators.spec import Machine
    from graftc.program.model import Model


def as_model(model: str | Model, *, on_meta: bool, weights: str | Path | None = None) -> Model:
    """MODEL by name, or the object; `weights` are read into it (on meta their names and shapes are checked)."""
    from graftc.program.given_weights import load_weights
    from graftc.program.model import as_model as made
    from graftc.program.model import load_model

    if isinstance(model, str):
        return load_model(model, on_meta=on_meta, weights=weights)
    given = made(model)
    if weights is not None:
        load_weights(given.module, Path(weights))
    return given


def machine_of(device: str, dtype: str, to: str) -> Machine:
    """Where a student is to run, from the words for it; G823 for another word.

    Of a device with its number, as `distill` takes it, the kind alone counts.

    >>> machine_of("cuda:1", "bf16", "torch")
    Machine(device='cuda', dtype='bf16', to='torch')
    """
    from graftc.operators.spec import Machine

    kind = device.partition(":")[0] if re.fullmatch(r"(cpu|cuda):\d+", device) else device
    words = {
        "device": (kind, ("cpu", "cuda")),
        "dtype": (dtype, ("fp32", "fp16", "bf16")),
        "to": (to, ("torch", "onnx", "tensorrt")),
    }
    for name, (found, wanted) in words.items():
        if found not in wanted:
            fail(
                "G823",
                f"no student can be made for {name} `{found}`",
                site=f"--{name}",
                wanted=", ".join(wanted),
                found=found,
            )
    return Machine(kind, dtype, to)


def as_build(build: str | Path | Build) -> Build:
    from graftc.emit.build import Build

    return build if isinstance(build, Build) else Build.open(Path(build))


def load_data(data: str | Any) -> Any:
    """DATA by name, or the object itself.

    A name is `file.py:function` (called), the path of a folder of safetensors shards, or `hf:NAME#CONFIG:SPLIT`,
    a data set of Hugging Face, streamed.
    """
    from graftc.distillation import call_data
    from graftc.distillation.shards import Shards, hugging_face
    from graftc.program.model import Reference

    if not isinstance(data, str):
        return data
    if data.startswith("hf:"):
        return hugging_face(data.removeprefix("hf:"))
    if Path(data).is_dir():
        return Shards(Path(data))
    return call_data(Reference(data, "DATA").resolve())


def load_task(task: str | Any) -> Any:
    """TASK by name: a shipped one, `file.py:Task` (called if it is a class or a function), or the object."""
    from graftc.program.model import Reference, user_error
    from graftc.tasks import get_task

    if not isinstance(task, str):
        return task
    if ":" not in task:
        try:
            return get_task(task)()
        except ValueError as error:
            fail("G230", str(error), site="-t")
    found = Reference(task, "TASK").resolve()
    try:
        return found() if callable(found) else found
    except Exception as error:
        raise user_error(error, "TASK", task) from error


def task_of(build: Build, task: str | Any) -> Any:
    if task is not None:
        return load_task(task)
    recorded = build.manifest.get("task") or {}
    if "absolute" in recorded:  # else it is the model's own, or was given as an object
        return load_task(recorded["absolute"])
    model = (build.manifest.get("model") or {}).get("absolute")
    own = as_model(model, on_meta=True).task if model else None
    if own is None:
        fail(
            "G231",
            "no task: the model names none",
            site=str(build.path),
            wanted="-t TASK",
            help="give -t ddpm, -t file.py:Task, or return graftc.Model(…, task = …)",
        )
    return load_task(own)


def task_inputs(build: Build, data: str | Any) -> Any:
    """Inputs by batch size, as the Task draws them from DATA: given, or recorded at compile; else None."""
    chosen = data if data is not None else (build.manifest.get("data") or {}).get("absolute")
    if chosen is None:
        return None
    from graftc.distillation.data import open_data

    source = open_data(load_data(chosen), seed=0, fraction=None, samples=None, validation=None)
    task = task_of(build, None)
    return lambda batch, g: source.prepared(task, g.initial_seed() % 997, batch, "verify").inputs


def recorded_sources(build: Build, data: Any, task: Any, command: str = "") -> dict[str, Any]:
    """DATA and TASK for the run's record: by reference and hash where they were named, else by class.

    `command` is what was typed, if anything was.
    """
    from graftc.program.model import Reference, source_of

    def entry(what: Any, kind: str) -> dict[str, str]:
        if not isinstance(what, str):
            return source_of(what)
        if ":" not in what or what.startswith("hf:") or Path(what).is_dir():
            return {"reference": what}
        return {"reference": what, "sha256": Reference(what, kind).source_hash()}

    used = build.manifest.get("task") if task is None else entry(task, "TASK")
    named = {"data": entry(data, "DATA"), "task": used}
    return {**named, "command": command} if command else named
