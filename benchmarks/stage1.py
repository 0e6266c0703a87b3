"""Stage 1 for all sites in one teacher pass a step, against one site at a time (the released code's way).

    python benchmarks/stage1.py

Same steps and same batch, with the shares of the teacher's pass and of the sites' own work.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from timing import Report

import graftc.verbs as verbs
from graftc.distillation.activations import Teacher
from graftc.distillation.generation import Generation

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


class Clock:
    """CPU seconds of stage 1's steps, and of the teacher's passes in them: both from the run itself."""

    def __init__(self) -> None:
        self.steps = self.teacher = 0.0

    def read(self, which: str, steps: int, folder: Path) -> tuple[float, float]:
        """Of one run; its validations, its first weights and its start are in neither."""
        name = which.strip("{}")
        file = folder / f"{name}.graft"
        file.write_text(RULE.format(which=which))
        build = verbs.compile(file, MODEL, folder / name, data=DATA)
        self.steps = self.teacher = 0.0
        with patch.object(Generation, "_step", self._timed(Generation._step)):  # pyright: ignore[reportPrivateUsage]
            verbs.distill(build, DATA, steps=steps, batch=BATCH, stacked="never")
        return self.steps, self.teacher

    def _timed(self, step: Any) -> Any:
        def timed(*args: Any) -> Any:
            run = Teacher.run

            def passed(*given: Any) -> Any:
                started = time.process_time()
                found = run(*given)
                self.teacher += time.process_time() - started
                return found

            started = time.process_time()
            with patch.object(Teacher, "run", passed):
                found = step(*args)
            self.steps += time.process_time() - started
            return found

        return timed


def measure(steps: int = 60) -> Report:
    """One site at a time with all sites at once in the middle, so that a drift of the machine hits both."""
    half, clock = len(SITES) // 2, Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = [clock.read(f"{{{i}}}", steps, folder) for i in SITES[:half]]
        together, teacher = clock.read("odd", steps, folder)
        each = first + [clock.read(f"{{{i}}}", steps, folder) for i in SITES[half:]]
    apart, teachers = (sum(column) for column in zip(*each, strict=True))
    # n (T + s) / (T + n s): T as it is in the one pass, s (all that a step does beside it) as it is one at a time.
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
            f"`OMP_NUM_THREADS=1 python benchmarks/stage1.py`. CPU time of {steps} steps of batch {BATCH} each, teacher's passes timed in the runs themselves; the digits teacher, attention in blocks {', '.join(map(str, SITES))} to Hyena-X. Only the "
            "teacher's passes are shared: the sites' own forward and backward passes are the same work in both. A pass for one site ends after "
            "that site, so passes for early blocks are short.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
