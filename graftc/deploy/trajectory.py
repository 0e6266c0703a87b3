"""A wrong image is a trajectory: the Task's sampler in torch and in the runtime, step by step, down to a region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from graftc.deploy.directory import Export
from graftc.deploy.regions import watched
from graftc.deploy.scripts.verify import Copy, difference, expose, first_line, run, session
from graftc.deploy.scripts.verify import Export as Files
from graftc.emit.examples import tensors_of
from graftc.emit.verify import Rung

_SEED = 20250605
_CALL, _GROWTH = 2.0, 10.0
"""Times the tolerance of golden inputs: one call on an input that they do not have; the sample, in which errors add up."""
_NAME = "trajectory"


@dataclass
class _Recorder:
    """A model as the sampler calls it, with what it was given and what it answered."""

    answer: Any
    asked: bool = False
    calls: list[tuple[dict[str, Tensor], list[Tensor]]] = field(default_factory=list)

    def __call__(self, **inputs: Tensor) -> Any:
        self.asked = True
        output = self.answer(**inputs)
        kept = {k: v.detach().clone() for k, v in inputs.items()}
        self.calls.append((kept, [t.detach().clone() for t in tensors_of(output)]))
        return output


def check_trajectory(export: Export, model: nn.Module, task: Any, steps: int) -> list[Rung]:
    """Rungs for `steps` steps of the Task's sampler from one seed, and a control: a changed weight is found.

    `model`: the student in float32. Where the sample is off, the first step and the first region that are.
    """
    files = Files(export.path)
    names = list(files.about["outputs"])
    tolerance = float(files.about["tolerance"])
    limit = _GROWTH * tolerance
    count = int(files.cases[0]["sizes"].get("batch", 2))
    try:
        made = session(str(export.model))
    except Exception as error:  # the runtime's own error classes are not public
        return [Rung(_NAME, "NOT RUN", first_line(error))]
    torch_side = _Recorder(model)
    try:
        wanted = _sample(task, torch_side, count, steps)
        if isinstance(wanted, str):
            return [Rung(_NAME, "NOT RUN", wanted)]
        found, calls = _with(made, names, task, count, steps)
        errors = [_of_call(made, names, *call) for call in torch_side.calls]
    except Exception as error:  # the task's, the model's or the runtime's own
        return [Rung(_NAME, "FAIL", f"the sampler raised {first_line(error)}")]
    rungs = _steps(errors, _drift(torch_side, calls), _CALL * tolerance)
    off = _relative(wanted, found)
    state = "PASS" if off <= limit else "FAIL"
    rungs.append(
        Rung(
            f"{_NAME}, the sample",
            state,
            f"{off:.1e} relative L2 after {steps} steps (limit {limit:.0e})",
        )
    )
    if any(r.state == "FAIL" for r in rungs):
        rungs.append(_locate(files, model, Copy(files), torch_side, errors))
    rungs.append(_control(files, model, names, task, count, steps, torch_side, wanted, limit))
    return rungs


def _sample(task: Any, model: _Recorder, count: int, steps: int) -> Tensor | str:
    """The sample; or why the task has none. What it raises once it has asked the model is a failure."""
    generator = torch.Generator().manual_seed(_SEED)
    try:
        with torch.no_grad():
            return task.sample(model, count=count, generator=generator, steps=steps)
    except (TypeError, ValueError, NotImplementedError) as error:
        if model.asked:
            raise
        return f"this task has no sampler with steps: {first_line(error)}"


def _with(
    made: Any, names: list[str], task: Any, count: int, steps: int
) -> tuple[Tensor, list[Any]]:
    def answer(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = run(made, {k: v.numpy() for k, v in inputs.items()}, names)
        tensors = tuple(torch.from_numpy(numpy.asarray(a)) for a in found)
        return tensors[0] if len(tensors) == 1 else tensors

    recorder = _Recorder(answer)
    sample = _sample(task, recorder, count, steps)
    assert isinstance(sample, Tensor)
    return sample, recorder.calls


def _relative(wanted: Tensor, found: Tensor) -> float:
    return difference([wanted.detach().numpy()], [found.detach().numpy()])[1]


def _of_call(made: Any, names: list[str], inputs: dict[str, Tensor], wanted: list[Tensor]) -> float:
    """The runtime's own error in one call: on the very input that torch had."""
    found = run(made, {k: v.numpy() for k, v in inputs.items()}, names)
    return difference([t.numpy() for t in wanted], found)[1]


def _drift(torch_side: _Recorder, calls: list[Any]) -> list[float]:
    """How far apart the two are at each call, each on what its own steps gave."""
    pairs = zip(torch_side.calls, calls, strict=True)
    return [
        max(_relative(a, b) for a, b in zip(mine[1], theirs[1], strict=True))
        for mine, theirs in pairs
    ]


def _steps(errors: list[float], drift: list[float], limit: float) -> list[Rung]:
    rungs: list[Rung] = []
    for i, (error, apart) in enumerate(zip(errors, drift, strict=True)):
        state = "PASS" if error <= limit else "FAIL"
        said = (
            f"{error:.1e} relative L2 on torch's input (limit {limit:.0e}); {apart:.1e} on its own"
        )
        rungs.append(Rung(f"{_NAME}, call {i}", state, said))
    return rungs


def _locate(
    files: Files, model: nn.Module, copy: Copy, torch_side: _Recorder, errors: list[float]
) -> Rung:
    """The first call that is off, given torch's inputs, and in it the first region that is."""
    limit = _CALL * float(files.about["tolerance"])
    step = next((i for i, e in enumerate(errors) if not e <= limit), None)
    name = f"{_NAME}, the first that is off"
    if step is None:
        return Rung(
            name, "FAIL", "no call is off on torch's input: small errors add up over the steps"
        )
    region, error = first_region(files, model, copy, torch_side.calls[step][0])
    if region is None:
        return Rung(
            name, "FAIL", f"call {step}: no region of its own; errors add up over the regions"
        )
    rule = next((r["rule"] for r in files.about["regions"] if r["path"] == region), "")
    return Rung(
        name,
        "FAIL",
        f"call {step}, region `{region}`: {error:.1e} relative L2{f', {rule}' if rule else ''}",
    )


def first_region(
    files: Files, model: nn.Module, copy: Copy, inputs: Mapping[str, Tensor]
) -> tuple[str | None, float]:
    """The first region, in the order of the graph, whose output is not the student's; None if all are."""
    limit = max(float(files.about["tolerance"]), 1e-4) * (
        5 if files.about["precision"] != "fp32" else 1
    )
    entries = [r for r in files.about["regions"] if r["values"]]
    with torch.no_grad(), watched(model, [r["path"] for r in entries]) as seen:
        model(**inputs)
    entries = [r for r in entries if len(seen.get(r["path"], ())) == len(r["values"])]
    names = list(dict.fromkeys(v for r in entries for v in r["values"]))
    path = copy.folder / "regions.onnx"
    path.write_bytes(expose(copy.proto, names).SerializeToString())
    values = dict(
        zip(
            names,
            run(session(str(path)), {k: v.numpy() for k, v in inputs.items()}, names),
            strict=True,
        )
    )
    for entry in entries:
        wanted = [t.float().numpy() for t in seen[entry["path"]]]
        error = difference(
            wanted, [numpy.asarray(values[v], numpy.float32) for v in entry["values"]]
        )[1]
        if not error <= limit:
            return str(entry["path"]), error
    return None, 0.0


def _control(
    files: Files, model: nn.Module, names: list[str], task: Any, count: int, steps: int, torch_side: _Recorder,
    wanted: Tensor, limit: float,
) -> Rung:  # fmt: skip
    """A weight of the middle is changed: the sample must be off, and its region found."""
    name = "  control: a weight changed"
    copy = Copy(files)
    paths = [r["path"] for r in files.about["regions"] if r["values"]]
    inner = [
        i
        for i in copy.proto.graph.initializer
        if len(i.dims) == 2 and any(i.name.startswith(f"{p}.") for p in paths)
    ]
    if not inner:
        return Rung(name, "NOT RUN", "no region has a matrix of its own", False)
    weight = inner[len(inner) // 2]
    owner = max((p for p in paths if weight.name.startswith(f"{p}.")), key=len)
    array = copy.array(weight)
    copy.write(weight, (2 * array.astype(numpy.float32) + 0.1).astype(array.dtype))
    found, _ = _with(session(str(copy.save())), names, task, count, steps)
    off = _relative(wanted, found)
    region, _ = first_region(files, model, copy, torch_side.calls[0][0])
    seen = not off <= limit and region == owner
    return Rung(
        name,
        "PASS" if seen else "FAIL",
        f"`{weight.name}`: the sample is {off:.1e} off, first in `{region}`",
    )
