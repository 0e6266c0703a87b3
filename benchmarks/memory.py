"""Resident memory of stage 1 in each mode, against what the planner predicts before it starts.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

Each mode runs in a process of its own. What Python and torch take before the run is measured there and taken off;
the peak is the kernel's (VmHWM, reset before the run). Linux only. `--only MODE …` measures some of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import Report

import graftc
import graftc.verbs as verbs
from graftc.distillation.planner import size_text
from graftc.emit.build import Build

SHAPE = {"dim": 256, "depth": 4, "num_heads": 4, "size": 16}
RULE = """
rule hyena {
    match   a = self_attention in blocks odd
    replace a with hyena_x(kernel = 4)
    init    q = a.q, k = a.k, v = a.v, out = a.out
    distill l1
}
"""
BATCH, STEPS, SAMPLES = 16, 4, 80
OPTIONS: dict[str, Any] = {"batch": BATCH, "steps": STEPS, "stacked": "never", "threads": 1}
MODES: dict[str, dict[str, Any]] = {
    "stream": {},
    "replay, used twice": {"reuse": 2},
    "replay, used four times": {"reuse": 4},
    "replay, half of it on disk": {"reuse": 4, "memory": "SPILL", "disk": "8GB"},
    "cache": {"cache": "CACHE"},
    "site by site": {"site_by_site": True},
    "site by site, used twice": {"site_by_site": True, "reuse": 2},
}


MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"latent": torch.randn(1, 16, 16, generator=generator), "label": torch.tensor(i % 10)}
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


def child(folder: str, options: dict[str, Any]) -> None:
    """One run: what it took over what was there before, as JSON."""
    import torch._dynamo  # pyright: ignore[reportUnusedImport]  optimisers import it at their first step

    torch.set_num_threads(1)
    layer = torch.nn.Linear(64, 64)
    optimiser = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(256, 64)).square().mean().backward()
    optimiser.step()  # kernels and threads that any run has
    build, samples, made = Build.open(Path(folder)), data(), task()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    graftc.distill(build, samples, task=made, **OPTIONS, **options)
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def _run(folder: Path, options: dict[str, Any], environment: dict[str, str]) -> int:
    """Bytes that a run in a process of its own took at most, over what was there before."""
    for kept in (folder / "runs", folder.parent / "cache"):
        shutil.rmtree(kept, ignore_errors=True)
    command = [sys.executable, __file__, str(folder), json.dumps(options)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] - found["before"]


def measure(only: tuple[str, ...] = ()) -> Report:
    """The table, or the rows of some modes."""
    from student import make_model

    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "r.graft").write_text(RULE)
        build = verbs.compile(
            folder / "r.graft", make_model(SHAPE), folder / "b", copy_teacher=True
        )
        streamed = graftc.plan_distill(build, data(), task=task(), **OPTIONS)
        batch = streamed.groups[0][0].kept
        for mode, wanted in MODES.items():
            if only and mode not in only:
                continue
            options = dict(wanted)
            if options.get("memory") == "SPILL":
                options["memory"] = streamed.peak + 2 * batch
            if "cache" in options:
                options["cache"] = str(folder / "cache")
            plan = graftc.plan_distill(build, data(), task=task(), **OPTIONS, **options)
            taken = [_run(build.path, options, {}), _run(build.path, options, MAPPED)]
            ratios = [plan.peak / t - 1 for t in taken]
            short = "" if abs(ratios[1]) <= 0.2 else " (short)"
            rows.append((mode, size_text(plan.peak), size_text(taken[1]), f"{100 * ratios[1]:+.0f} %{short}",
                         size_text(taken[0]), f"{100 * ratios[0]:+.0f} %", f"{plan.groups[0][1].window.batches} of {size_text(batch)}"))  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return Report(
        "Memory of stage 1 against the planner's prediction",
        ("mode", "predicted", "resident, large blocks mapped", "prediction against it (goal within 20 %)", "resident, glibc as it comes", "prediction against it", "batches kept"),
        tuple(rows),
        (
            f"`OMP_NUM_THREADS=1 python benchmarks/memory.py`. {STEPS} steps of batch {BATCH}, {SHAPE['depth']} blocks of width {SHAPE['dim']} with 256 tokens, "
            "attention in odd blocks to Hyena-X, first weights reused (the inside of a solve is not predicted). A process for each run; the kernel's peak "
            "(VmHWM, reset before the run) less the resident memory before it, which is Python, torch, DATA and a warm-up. The planner counts tensors. "
            "With MALLOC_MMAP_THRESHOLD_=65536 each tensor is mapped and goes back to the system when it is freed, so that what is resident is "
            "what is alive; as glibc comes, its heap keeps holes between tensors, which is the rest.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        print(measure(tuple(sys.argv[2:])).markdown())
    elif len(sys.argv) > 1:
        child(sys.argv[1], json.loads(sys.argv[2]))
    else:
        print(measure().markdown())
