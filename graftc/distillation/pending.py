"""Weights that wait for data: solved from the teacher's activations before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from graftc.diagnostics import fail
from graftc.distillation.cuts import extract
from graftc.distillation.generation import Generation
from graftc.distillation.students import Student, check_teacher
from graftc.distillation.targets import Pending
from graftc.distillation.teacher_parts import mlp_parts

MEMORY = 512 * 2**20
"""Bytes of activations held at a time; more sites than fit are solved in several teacher passes."""

SAMPLES = 512
"""Samples that a solve reads at most: with tens of tokens each, many rows to a column."""


def solve_pending(generation: Generation, phase: str) -> Iterator[tuple[int, int]]:
    """Solve the pending weights of a generation's students, yielding (sites done, sites in all).

    Several processes take turns: each solves its own from whole batches, as one process would, and gives the
    others what it found.
    Raises GraftError for a policy that is not known (G547).
    """
    waiting = [s for s in generation.students if s.site.pending]
    if not waiting:
        return
    size = generation.setting.data.size or SAMPLES
    batches = max(1, math.ceil(min(size, SAMPLES) / generation.batch))
    ranks = generation.setting.ranks
    first = generation.train_batch(0, phase, whole=True)
    values = generation.values(waiting, first, "init batch 0")
    heaviest = max(sum(v.nbytes for v in given) for given in values)
    together = max(1, MEMORY // (heaviest * batches))
    for start in range(0, len(waiting), together):
        chunk = waiting[start : start + together]
        mine = [(start + i) % ranks.size == ranks.rank for i in range(len(chunk))]
        rows: list[list[tuple[tuple[Tensor, ...], Tensor]]] = [[] for _ in chunk]
        for number in range(batches):
            prepared = generation.train_batch(number, phase, whole=True)
            values = generation.values(chunk, prepared, f"init batch {number}")
            check_teacher(chunk, values, f"init batch {number}")
            for student, given, row, own in zip(chunk, values, rows, mine, strict=True):
                if own:
                    row.append((student.inputs(given), given[-1]))
        for student, row, own in zip(chunk, rows, mine, strict=True):
            for pending in student.site.pending if own else ():
                _solve(student, pending, row, generation.setting.teacher)
        for done, student in enumerate(chunk, start + 1):
            ranks.spread(list(student.region.parameters()), (done - 1) % ranks.size)
            yield done, len(waiting)


def _solve(
    student: Student,
    pending: Pending,
    rows: Sequence[tuple[tuple[Tensor, ...], Tensor]],
    teacher: nn.Module,
) -> None:
    from graftc.weights.alternating import solve_alternating
    from graftc.weights.choose import solve_keep_top
    from graftc.weights.solve import solve_least_squares, solve_svd

    last = _inside(student, pending, pending.linear)
    try:
        if pending.policy == "least_squares":
            solve_least_squares(student.region, last, rows)
        elif pending.policy == "alternating":
            blocks = [
                replace(b, module=_inside(student, pending, b.module)) for b in pending.blocks
            ]
            solve_alternating(student.region, last, blocks, rows, sweeps=pending.sweeps)
        elif pending.policy == "svd":
            inner = _inside(student, pending, pending.blocks[0].module)
            solve_svd(student.region, inner, last, rows)
        elif pending.policy == "keep_top":
            blocks = [
                replace(b, module=_inside(student, pending, b.module)) for b in pending.blocks
            ]
            mlp = mlp_parts(extract(teacher, student.site.teacher), rows[0][0])
            solve_keep_top(student.region, last, blocks, mlp, rows)
        else:
            fail("G547", f"no way is known to solve `{pending.policy}` from data",
                 site=student.site.name, wanted="least_squares, alternating, svd or keep_top",
                 found=pending.policy)  # fmt: skip
    except ValueError as error:
        fail("G547", f"`{pending.linear}` of `{pending.module}` cannot be solved: {error}",
             site=student.site.name)  # fmt: skip


def _inside(student: Student, pending: Pending, linear: str) -> str:
    """A submodule's name inside the student's region."""
    full = f"{pending.module}.{linear}" if linear else pending.module
    cut = student.site.student
    for prefix in (cut.output, cut.graph):
        inside = full.removeprefix(f"{prefix}.") if prefix else full
        if any(name == inside for name, _ in student.region.named_modules()):
            return inside
    fail("G510", f"the region of `{student.site.name}` has no linear `{full}` to solve",
         site=student.site.name)  # fmt: skip
