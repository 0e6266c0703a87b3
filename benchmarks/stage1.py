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
from graftc.distillation.cuts import capture_graph
from graftc.distillation.targets import from_dict

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


def seconds(which: str, steps: int, folder: Path) -> tuple[float, float]:
    """CPU seconds of stage 1 alone (its validations are in it, first weights are not), and of its teacher passes.

    The passes are timed on their own, as often as there are steps, on the graph that stage 1 runs: it ends after the last site.
    """
    name = which.strip("{}")
    file = folder / f"{name}.graft"
    file.write_text(RULE.format(which=which))
    build = verbs.compile(file, MODEL, folder / name, data=DATA)
    started = time.process_time()
    verbs.distill(build, DATA, steps=steps, batch=BATCH)
    took = time.process_time() - started
    sites = from_dict(build.targets).sites
    graph = capture_graph(build.teacher(), [site.teacher for site in sites])
    size = {"x": (1, 8, 8), "t": (), "y": ()}
    inputs = {
        k: torch.zeros(BATCH, *s, dtype=torch.float32 if s else torch.int64)
        for k, s in size.items()
    }
    with torch.inference_mode():
        graph(**inputs)
        started = time.process_time()
        for _ in range(steps):
            graph(**inputs)
        return took, time.process_time() - started


def measure(steps: int = 60) -> Report:
    """One site at a time with all sites at once in the middle, so that a drift of the machine hits both."""
    half = len(SITES) // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = [seconds(f"{{{i}}}", steps, folder) for i in SITES[:half]]
        together, teacher = seconds("odd", steps, folder)
        each = first + [seconds(f"{{{i}}}", steps, folder) for i in SITES[half:]]
    apart, teachers = (sum(column) for column in zip(*each, strict=True))
    # n (T + s) / (T + n s), with the sites' own work as it was measured one at a time.
    allowed = apart / (teacher + (apart - teachers))
    reached = apart / together / allowed
    return Report(
        "Stage 1: all sites in one pass",
        ("", "CPU seconds", "of them the teacher's passes", "share"),
        (
            (f"{len(SITES)} sites, one at a time", f"{apart:.1f}", f"{teachers:.1f}", f"{teachers / apart:.0%}"),
            (f"{len(SITES)} sites in one pass", f"{together:.1f}", f"{teacher:.1f}", f"{teacher / together:.0%}"),
            ("gain", f"{apart / together:.2f}x", f"{teachers / teacher:.2f}x", ""),
            ("gain that the shares allow, n(T + s) / (T + ns)", f"{allowed:.2f}x", "", f"{reached:.0%} of it reached (goal 80%)"),
        ),
        (
            f"{steps} steps of batch {BATCH} each, the digits teacher, attention in blocks {', '.join(map(str, SITES))} to Hyena-X. Only the "
            "teacher's passes are shared: the sites' own forward and backward passes are the same work in both. A pass for one site ends after "
            "that site, so passes for early blocks are short.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
