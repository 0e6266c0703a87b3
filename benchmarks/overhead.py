"""The engine against a bare loop of the same steps, by CPU time: stage 1 and stage 2.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

The bare loop is what one would write for this model alone: the batch from the data set, the Task's noise,
the teacher's pass cut off after the last site, one loss a site, clipping, the optimiser and its schedule. It
checks, logs, counts and saves nothing.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Report, interleaved
from torch.utils.data import default_collate

import graftc.verbs as verbs
from graftc.distillation.budget import Plan
from graftc.distillation.cuts import capture_graph
from graftc.distillation.data import open_data, prepare
from graftc.distillation.generation import Generation, Setting
from graftc.distillation.optim import Schedule
from graftc.distillation.stage2 import finetune_module
from graftc.distillation.students import students_of
from graftc.distillation.targets import Stage2, Targets
from graftc.distillation.targets_file import from_dict
from graftc.loading import load_data, task_of

ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT}/examples/digits/model.py:teacher"
DATA = f"{ROOT}/examples/digits/data.py:images"
RULE = """rule hyena {
    match   a = self_attention in blocks odd
    replace a with hyena_x(kernel = 4)
    distill l1
}
"""
BATCH, STEPS1, STEPS2, ROUNDS = 32, 72, 24, 3


def batches(data: Any, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        chosen = order[step * BATCH % 1024 :][:BATCH]
        yield default_collate([data[i] for i in chosen])


def bare_stage1(
    targets: Targets, teacher: Any, student: Any, task: Any, data: Any
) -> Iterator[None]:
    """One step after the other, yielding after each."""
    sites = targets.sites
    graph = capture_graph(teacher, [s.teacher for s in sites])
    modules = [student.get_submodule(s.student.output) for s in sites]
    parameters = [list(m.parameters()) for m in modules]
    flat = [p for group in parameters for p in group]
    optimiser = torch.optim.AdamW(flat, lr=1e-3, weight_decay=0.0, fused=True)
    schedule = Schedule(STEPS1, warmup=4)
    generator = torch.Generator().manual_seed(1)
    for step, sample in enumerate(batches(data, STEPS1)):
        prepared = task.prepare(sample, generator)
        with torch.no_grad():
            values = graph(**prepared.inputs)
        optimiser.zero_grad(set_to_none=True)
        losses = [
            F.l1_loss(m(given[0]), given[-1]) for m, given in zip(modules, values, strict=True)
        ]
        torch.stack(losses).sum().backward()
        for group in parameters:
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        for entry in optimiser.param_groups:
            entry["lr"] = 1e-3 * schedule(step)
        optimiser.step()
        yield


def engine_stage1(
    targets: Targets, teacher: Any, student: Any, task: Any, data: Any
) -> Iterator[bool]:
    """The engine's steps; True where a step ended with a validation."""
    source = open_data(data)
    setting = Setting(teacher, targets.inputs, source, task, 0, "adamw", "never")
    plans = {s.name: Plan(STEPS1, BATCH, 1e-3) for s in targets.sites}
    generation = Generation(setting, 0, students_of(student, targets.sites), plans)
    generation.begin()
    for _, values in generation.train(generation.make_optimiser()):
        yield any(name.endswith(".error") for name in values)


def stage1(
    targets: Targets, teacher: Any, student: Any, task: Any, data: Any
) -> tuple[list[float], list[float]]:
    """CPU seconds of each step: the engine's and the bare loop's take turns, step by step."""
    given = (targets, teacher)
    bare = bare_stage1(*given, copy.deepcopy(student).train(), task, data)
    engine = engine_stage1(*given, copy.deepcopy(student).train(), task, data)
    ours: list[float] = []
    theirs: list[float] = []
    for step in range(STEPS1):
        seconds: dict[str, float] = {}
        validated = False
        for name in (
            ("ours", "theirs") if step % 2 else ("theirs", "ours")
        ):  # no one is always second
            started = time.process_time()
            if name == "ours":
                validated = next(engine)
            else:
                next(bare)
            seconds[name] = time.process_time() - started
        if not validated:
            ours.append(seconds["ours"])
            theirs.append(seconds["theirs"])
    return ours, theirs


def bare_stage2(student: Any, task: Any, data: Any) -> list[float]:
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    seen = [time.process_time()]
    for step, sample in enumerate(batches(data, STEPS2)):
        prepared = task.prepare(sample, generator)
        optimiser.zero_grad(set_to_none=True)
        task.loss(student(**prepared.inputs), prepared).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.9999, (1 + step) / (10 + step)))
        seen.append(time.process_time())
    return [b - a for a, b in itertools.pairwise(seen)]


def engine_stage2(student: Any, task: Any, data: Any, targets: Targets) -> list[float]:
    seen: list[tuple[float, bool]] = []
    finetune_module(
        student, task, data, stage2=Stage2(steps=STEPS2, batch=BATCH), inputs=targets.inputs,
        progress=lambda *given: seen.append((time.process_time(), "held_out" in given[3])),
    )  # fmt: skip
    pairs = itertools.pairwise(seen)
    return [b - a for (a, _), (b, validated) in pairs if not validated]


def row(name: str, ours: list[float], theirs: list[float]) -> tuple[str, ...]:
    ratio = statistics.median(ours) / statistics.median(theirs)
    return (name, f"{1000 * statistics.median(theirs):.1f} ms", f"{1000 * statistics.median(ours):.1f} ms",
            f"{100 * (ratio - 1):+.1f} %{'' if ratio <= 1.05 else ' (short)'}")  # fmt: skip


def noise(task: Any, data: Any) -> tuple[str, ...]:
    """A batch as the task prepares it, from one generator and from one for each sample: CPU time of a batch."""
    sample = next(batches(data, 1))
    bare = torch.Generator().manual_seed(1)
    seeds = list(range(BATCH))
    found = interleaved(
        {"bare": lambda: task.prepare(sample, bare), "ours": lambda: prepare(task, sample, seeds)},
        rounds=200,
        warmup=5,
        clock=time.process_time,
    )
    one, other = (statistics.median(found[n]) for n in ("bare", "ours"))
    extra = f"{1e6 * (other - one) / BATCH:.0f} µs a sample"
    return (
        f"noise by sample, batch of {BATCH}",
        f"{1000 * one:.1f} ms",
        f"{1000 * other:.1f} ms",
        extra,
    )


def measure() -> Report:
    data = load_data(DATA)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.graft"
        file.write_text(RULE)
        build = verbs.compile(file, MODEL, Path(folder) / "b")
        targets, teacher = from_dict(build.targets), build.teacher().eval()
        task = task_of(build, None)
        first = stage1(targets, teacher, build.student(), task, data)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            theirs += bare_stage2(build.student().train(), task, data)[1:]
            ours += engine_stage2(build.student(), task, data, targets)
        drawn = noise(task, data)
    return Report(
        "The engine against a bare loop, CPU time a step",
        ("", "bare loop", "graftc", "overhead (goal at most 5 %)"),
        (row(f"stage 1, {len(targets.sites)} sites", *first), row("stage 2", ours, theirs), drawn),
        (
            f"`OMP_NUM_THREADS=1 python benchmarks/overhead.py`. Medians over steps of batch {BATCH} of the digits teacher, attention in odd blocks to "
            "Hyena-X, AdamW in both; in stage 1 the two take turns step by step, in stage 2 run by run. Steps that end with a validation are left out: "
            "there are eight a run, whatever its length. CPU time, so what else the machine does is not in it. The last row is a part of the others: a "
            "generator's state for each sample, so that a sample's noise is the same in whatever batch, process or run.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
