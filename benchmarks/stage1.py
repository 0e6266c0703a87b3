"""Stage 1 for all sites in one teacher pass a step, against one site at a time (the released code's way).

    python benchmarks/stage1.py

Same steps, same batch. With T the teacher's time and s a site's, n sites should gain n(T+s)/(T+ns).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from timing import Report

import graftc.verbs as verbs

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


def seconds(which: str, steps: int, folder: Path) -> float:
    """Seconds of stage 1 alone, first weights included."""
    file = folder / f"{which.strip('{}')}.graft"
    file.write_text(RULE.format(which=which))
    build = verbs.compile(file, MODEL, folder / f"build-{which.strip('{}')}", copy_teacher=True)
    started = time.perf_counter()
    verbs.distill(build, DATA, steps=steps, batch=64)
    return time.perf_counter() - started


def measure(steps: int = 40) -> Report:
    """All four sites at once, then one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together = seconds("odd", steps, folder)
        apart = [seconds(f"{{{i}}}", steps, folder) for i in SITES]
    n, t_plus_s = len(apart), sum(apart) / len(apart)
    # together = T + n·s and apart = T + s a site, in the same units: two equations for T and s.
    s = (together - t_plus_s) / (n - 1)
    t = t_plus_s - s
    gain = sum(apart) / together
    return Report(
        "Stage 1: all sites in one pass",
        ("sites", "one at a time", "in one pass", "gain", "teacher's share T/(T+s)", "steps"),
        ((str(n), f"{sum(apart):.1f} s", f"{together:.1f} s", f"{gain:.2f}x", f"{t / (t + s):.2f}", str(steps)),),
        (
            f"{torch.get_num_threads()} threads, batch 64, digits. A teacher pass for one site ends after that site, so a site in an early "
            "block costs less teacher than n(T+s)/(T+ns) assumes. Validation and least-squares first weights are in both times.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
