"""First weights that need data, for a student that is still in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from graftc.diagnostics import Diagnostic
from graftc.distillation.budget import site_plans
from graftc.distillation.data import Task, open_data
from graftc.distillation.generation import Generation, Setting
from graftc.distillation.pending import solve_pending
from graftc.distillation.students import students_of
from graftc.distillation.targets import Targets


def solve_first_weights(
    targets: Targets, teacher: nn.Module, student: nn.Module, data: Any, task: Task, *, seed: int
) -> tuple[Targets, tuple[Diagnostic, ...]]:
    """Solve every pending weight of `student` in place, inner sites first.

    Returns the targets with what is still pending, and a warning where DATA is a single sample (G828).

    `teacher` and `student` may be Programs' roots: any modules that `capture_graph` can read. A site
    that is distilled after others keeps its weights pending too: they are solved again, from the
    inner sites' trained students, when `distill` reaches it.
    """
    source = open_data(data, seed=seed, fraction=None, samples=None, validation=None)
    setting = Setting(teacher.eval(), targets.inputs, source, task, seed, "adamw", "never")
    for number, sites in enumerate(targets.generations()):
        waiting = tuple(s for s in sites if s.pending)
        if not waiting:
            continue
        generation = Generation(
            setting,
            number,
            students_of(student, waiting),
            site_plans(waiting, source.size),
        )
        for _ in solve_pending(generation, f"init.{number}"):
            pass
    told = ()
    if source.size == 1:
        told = (Diagnostic("G828", "first weights are fitted to a single sample: DATA has no more", site="DATA",
                           help="give more samples: 512 are read at most", severity="warning"),)  # fmt: skip
    sites = tuple(s if s.after else replace(s, pending=()) for s in targets.sites)
    return replace(targets, sites=sites), told
