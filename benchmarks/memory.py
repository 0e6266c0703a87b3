"""Resident memory of both stages in each mode, against what the planner predicts before it starts.

    python benchmarks/memory.py

Each mode runs in a process of its own. What Python and torch take before the run is measured there and taken off;
the peak is the kernel's (VmHWM, reset before the run). Linux only. `--only NAME …` measures some models or modes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import Report

import graftc
import graftc.verbs as verbs
from graftc.distillation.resident import CODE, MEASURED_STEPS, Allocator
from graftc.emit.build import Build
from graftc.units import size_text

SHAPES: dict[str, dict[str, int]] = {
    "digits": {"dim": 64, "depth": 8, "num_heads": 4},
    "width 256": {"dim": 256, "depth": 4, "num_heads": 4, "size": 16},
    "width 384": {"dim": 384, "depth": 12, "num_heads": 6, "size": 16},
}
BATCHES = {"digits": 64, "width 256": 16, "width 384": 8}
RULE = """
rule hyena {
    match   a = self_attention in blocks odd
    replace a with hyena_x(kernel = 4)
    init    q = a.q, k = a.k, v = a.v, out = a.out
    distill l1
}
"""
STEPS, SAMPLES = 8, 320
OPTIONS: dict[str, Any] = {"stacked": "never", "threads": 1, "steps": STEPS}
MODES: dict[str, dict[str, Any]] = {
    "stream": {},
    "replay, used twice": {"reuse": 2},
    "replay, used four times": {"reuse": 4},
    "replay, half of it on disk": {"reuse": 4, "memory": "SPILL", "disk": "8GB"},
    "cache": {"cache": "CACHE"},
    "site by site": {"site_by_site": True},
    "site by site, used twice": {"site_by_site": True, "reuse": 2},
}
STAGE2: dict[str, dict[str, Any]] = {
    "stage 2": {},
    "stage 2, checkpointed": {"checkpointing": True},
    "stage 2, teacher and features too": {"teacher_weight": 1.0, "features_weight": 1.0},
}


def data(size: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"latent": torch.randn(1, size, size, generator=generator), "label": torch.tensor(i % 10)}
        for i in range(SAMPLES)
    ]


def task() -> Any:
    from graftc.program.model import Reference

    return Reference(f"{Path(__file__).parents[1]}/examples/digits/model.py:task").resolve()()


def resident(name: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"the system does not tell {name}")


def child(folder: str, size: int, options: dict[str, Any]) -> None:
    """One run: what it took over what was there before, as JSON."""
    import torch._dynamo  # pyright: ignore[reportUnusedImport]  optimisers import it at their first step

    torch.set_num_threads(1)
    layer = torch.nn.Linear(64, 64)
    optimiser = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(256, 64)).square().mean().backward()
    optimiser.step()  # kernels and threads that any run has
    build, samples, made = Build.open(Path(folder)), data(size), task()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if options.pop("stage") == 2:
        graftc.finetune(build, samples, task=made, steps=STEPS, threads=1, **options)
    else:
        graftc.distill(build, samples, task=made, **OPTIONS, **options)
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def _run(folder: Path, size: int, options: dict[str, Any]) -> int:
    """Bytes that a run in a process of its own took at most, over what was there before."""
    for kept in (folder / "runs", folder.parent / "cache"):
        shutil.rmtree(kept, ignore_errors=True)
    command = [sys.executable, __file__, "--child", str(folder), str(size), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] - found["before"]


def measure(only: tuple[str, ...] = ()) -> Report:
    """The table, or the rows of some models and modes."""
    rows: list[tuple[str, ...]] = []
    models = [m for m in SHAPES if m in only] or list(SHAPES)
    every = [*MODES, *STAGE2]
    modes = [m for m in every if m in only] or every
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            rows += _rows(model, modes, Path(name))
    return Report(
        "Memory against the planner's prediction",
        ("model", "mode", "tensors alive", "predicted", "resident", "prediction against it (goal within 20 %)", "batches kept"),
        tuple(rows),
        (
            f"`python benchmarks/memory.py`. {STEPS} steps, attention in odd blocks to Hyena-X, first weights reused; "
            + "; ".join(f"{m}: {SHAPES[m]['depth']} blocks, {SHAPES[m].get('size', 8) ** 2} tokens, batch {BATCHES[m]}" for m in models)
            + ". A process for each run, with glibc's settings as they come; the kernel's peak (VmHWM, reset before the run) less the resident "
            "memory before it, which is Python, torch, DATA and a warm-up. Tensors alive: what the planner counts. Predicted: what it makes of them, "
            f"{size_text(CODE)} for code that is read the first time and what the heap was seen to grow to while {MEASURED_STEPS} steps were run.",
        ),
    )  # fmt: skip


def _rows(model: str, modes: list[str], folder: Path) -> Iterator[tuple[str, ...]]:
    from student import make_model

    (folder / "r.graft").write_text(RULE)
    build = verbs.compile(
        folder / "r.graft", make_model(SHAPES[model]), folder / "b", copy_teacher=True
    )
    size = SHAPES[model].get("size", 8)
    own: dict[str, Any] = {"batch": BATCHES[model]}
    streamed = graftc.plan_distill(build, data(size), task=task(), **OPTIONS, **own)
    batch = streamed.groups[0][0].kept
    for mode in modes:
        if mode in STAGE2:
            options = {**own, **STAGE2[mode], "run": "untrained"}
            planned = graftc.plan_finetune(build, data(size), task=task(), steps=STEPS, **options)
            predicted, alive, kept = planned.peak, planned.costs.peak(allocator=Allocator()), "none"
            options["stage"] = 2
        else:
            options = {**own, **MODES[mode]}
            if options.get("memory") == "SPILL":
                options["memory"] = streamed.peak + 2 * batch
            if "cache" in options:
                options["cache"] = str(folder / "cache")
            plan = graftc.plan_distill(build, data(size), task=task(), **OPTIONS, **options)
            made = max((choice for _, choice in plan.groups), key=lambda one: one.peak)
            predicted, alive = plan.peak, made.tensors
            kept = f"{made.window.batches} of {size_text(batch)}"
            options["stage"] = 1
        taken = _run(build.path, size, options)
        ratio = predicted / taken - 1
        short = "" if abs(ratio) <= 0.2 else " (short)"
        row = (model, mode, size_text(alive), size_text(predicted), size_text(taken),
               f"{100 * ratio:+.0f} %{short}", kept)  # fmt: skip
        print(row, file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        print(measure(tuple(sys.argv[2:])).markdown())
    elif sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        print(measure().markdown())
