"""Stage 1 for all sites in one teacher pass a step, against one site at a time (the released code's way).

    python benchmarks/stage1.py

Same steps and same batch, with the shares of the teacher's pass and of the sites' own work.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from timing import Report

import graftc.verbs as verbs
from graftc.program.model import Reference

ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT}/examples/digits/model.py:teacher"
DATA = f"{ROOT}/examples/digits/data.py:images"
RULE = """
rule hyena {{
    match   a = self_attention in blocks {which}
    replace a with hyena_x(kernel = 4)
    distill l1
}}
"""
SITES = (1, 3, 5, 7)
BATCH = 64


def seconds(which: str, steps: int, folder: Path) -> float:
    """Seconds of stage 1 alone: its validations are in it, first weights are not."""
    name = which.strip("{}")
    file = folder / f"{name}.graft"
    file.write_text(RULE.format(which=which))
    build = verbs.compile(file, MODEL, folder / name, data=DATA)
    started = time.perf_counter()
    verbs.distill(build, DATA, steps=steps, batch=BATCH)
    return time.perf_counter() - started


def teacher_seconds(steps: int) -> float:
    """Seconds of as many forward passes of the whole teacher, without gradient."""
    model = Reference(MODEL, "MODEL").resolve()()
    inputs = {k: v[:1].expand(BATCH, *v.shape[1:]).contiguous() for k, v in model.inputs.items()}
    with torch.inference_mode():
        model.module(**inputs)
        started = time.perf_counter()
        for _ in range(steps):
            model.module(**inputs)
        return time.perf_counter() - started


def measure(steps: int = 60) -> Report:
    """One site at a time with all sites at once in the middle, so that a drift of the machine hits both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = [seconds(f"{{{i}}}", steps, folder) for i in SITES[: len(SITES) // 2]]
        together = seconds("odd", steps, folder)
        apart = first + [seconds(f"{{{i}}}", steps, folder) for i in SITES[len(SITES) // 2 :]]
    teacher = teacher_seconds(steps)
    count = len(apart)
    return Report(
        "Stage 1: all sites in one pass",
        ("sites", "one at a time", "in one pass", "gain", "teacher's share of one site's run", "of the one pass"),
        (
            (
                str(count), f"{sum(apart):.1f} s", f"{together:.1f} s", f"{sum(apart) / together:.2f}x",
                f"{min(1.0, teacher * count / sum(apart)):.0%}", f"{min(1.0, teacher / together):.0%}",
            ),
        ),
        (
            f"{steps} steps of batch {BATCH} each, the digits teacher, attention in blocks {', '.join(map(str, SITES))} to Hyena-X. With a "
            "teacher pass of T seconds and a site's own work of s, n sites gain at most n(T + s) / (T + ns). The teacher's share is timed on "
            "its own, whole; a run for one site ends its pass after that site, so for early blocks the share is an upper bound.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
