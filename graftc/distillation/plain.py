"""The targets of a build as plain PyTorch: capture, students, losses and merge, for any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import fail, nearest
from graftc.distillation.activations import Teacher
from graftc.distillation.budget import BATCH, site_plans
from graftc.distillation.candidates import Loaded, candidate_students, load_candidates
from graftc.distillation.data import Task, open_data
from graftc.distillation.generation import Generation, Setting
from graftc.distillation.loss import Moments, Scale
from graftc.distillation.optim import align
from graftc.distillation.pending import solve_pending
from graftc.distillation.run import Build
from graftc.distillation.scopes import without_dropout
from graftc.distillation.students import Student, students_of
from graftc.distillation.targets import Cut, Site, Targets
from graftc.distillation.targets_file import from_dict

GATE, OUTPUT = "gate", "output"
"""Names of the values of a cut beside its inputs."""


class Capture(nn.Module):
    """The teacher up to the last wanted value: named inputs → site → named values. One pass for all."""

    def __init__(self, teacher: nn.Module, cuts: Mapping[str, Cut]) -> None:
        super().__init__()
        self._cuts = dict(cuts)
        self._once = tuple(dict.fromkeys(self._cuts.values()))
        self.graph: Any = Teacher(teacher).graph(self._once)

    @torch.no_grad()
    def forward(self, **inputs: Tensor) -> dict[str, dict[str, Tensor]]:
        found = dict(zip(self._once, self.graph(**inputs), strict=True))
        return {
            name: dict(zip(value_names(cut), found[cut], strict=True))
            for name, cut in self._cuts.items()
        }


def value_names(cut: Cut) -> list[str]:
    """What a cut's values are called: its inputs, the gate where the loss is weighted by it, the output."""
    return [*(i.name for i in cut.inputs), *([GATE] if cut.gate else []), OUTPUT]


class SiteStudent(nn.Module):
    """A site's region in the student, or a candidate: named values → output. Its parameters are the model's."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.region = student.region
        self.site = student.site
        self.named = dict(student.parameters)

    def forward(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.region(*(values[i.name] for i in self.site.student.inputs))

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the site trains; the region may hold others."""
        return list(self.named.values())


class SiteLoss(nn.Module):
    """A site's loss: (output, values) → scalar, times its weight. In units of the batch's own target, unless
    `scale` is set (`graftc.distillation.loss.Scale`)."""

    def __init__(self, student: Student, scale: Scale | None = None) -> None:
        super().__init__()
        self._student = student
        self.scale = scale

    def forward(self, output: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        given = [values[name] for name in value_names(self._student.site.teacher)]
        scale = self.scale or scale_of(self._student, given)
        return self._student.site.loss.weight * self._student.loss(output, given, scale)


def scale_of(student: Student, values: Sequence[Tensor]) -> Scale:
    """What the target measures over one batch. Raises GraftError (G543) where it is zero."""
    target = student.weighed(values[-1], values)
    moments = Moments()
    moments.add(target)
    scale = moments.scale()
    if not scale.energy > 0:
        fail("G543", f"the teacher's output at `{student.site.name}` is zero on this batch",
             site=student.site.name, found="nothing to distil")  # fmt: skip
    if (above := student.site.loss.mask_above) is None:
        return scale
    limit = above * scale.energy**0.5
    kept = Moments()
    kept.add(target, limit)
    return replace(kept.scale(limit), kurtosis=scale.kurtosis)


class Distillation:
    """A build's targets, ready to train with. `students` and `losses` are by name; a candidate is `SITE/N`."""

    def __init__(self, build: Build, task: Task | None = None) -> None:
        self.targets: Targets = from_dict(build.targets)
        self.teacher = align(build.teacher()).eval().requires_grad_(False)
        self.student = align(build.student()).train()
        self._rates = without_dropout(self.student)
        self.task = task
        self._candidates: dict[str, Loaded] = {
            one.site.name: one for one in load_candidates(build, self.targets.sites)
        }
        found: list[Student] = []
        for sites in self.targets.generations():
            found += students_of(self.student, sites)
        found += candidate_students(list(self._candidates.values()))
        self._students = {student.site.name: student for student in found}
        self.students = {name: SiteStudent(s) for name, s in self._students.items()}
        self.losses = {name: SiteLoss(s) for name, s in self._students.items()}

    def generations(self) -> list[list[str]]:
        """Names in the order of training: each group needs only the groups before it."""
        return [
            [n for n in self.students if self._of(n).name in {s.name for s in sites}]
            for sites in self.targets.generations()
        ]

    def _of(self, name: str) -> Site:
        loaded = self._candidates.get(name)
        return self._students[name].site if loaded is None else loaded.of

    def capture(self, names: Sequence[str] | None = None) -> Capture:
        """One module that gives the teacher's values of these sites (None: of all). Raises GraftError (G581)."""
        chosen = list(self.students) if names is None else list(names)
        for name in chosen:
            if name not in self.students:
                near = nearest(name, list(self.students))
                fail("G581", f"no site or candidate `{name}`", site="targets.yaml",
                     wanted=", ".join(self.students), found=name,
                     help=f"write `{near}`" if near else None)  # fmt: skip
        return Capture(self.teacher, {n: self._students[n].site.teacher for n in chosen})

    def batches(
        self, data: Any, *, batch: int = BATCH, seed: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """The model's named inputs as the task prepares them from DATA, without end."""
        source, task, step = open_data(data, seed=seed), self._task(), 0
        while True:
            yield source.prepared(task, step, batch, "loop").inputs
            step += 1

    def solve(self, data: Any, names: Sequence[str] | None = None, *, seed: int = 0) -> None:
        """First weights that wait for data, of these sites, in place; inner sites should be trained before."""
        source = open_data(data, seed=seed)
        chosen = [self._students[n] for n in (self.students if names is None else names)]
        waiting = [s for s in chosen if s.site.pending]
        if not waiting:
            return
        setting = Setting(
            self.teacher, self.targets.inputs, source, self._task(), seed, "adamw", "never"
        )
        plans = site_plans([s.site for s in waiting], source.size)
        for _ in solve_pending(Generation(setting, 0, waiting, plans), "init.0"):
            pass

    def merge(self, choose: Mapping[str, int] | None = None) -> nn.Module:
        """The student with what was trained, in eval mode, its dropout on again for train mode. `choose`: site → which candidate takes its place.

        The student's own modules are used, not copied. Raises GraftError: no such candidate (G581), one
        that the student's call cannot take (G582).
        """
        for site_name, index in (choose or {}).items():
            if index == 0:
                continue
            one = self._candidates.get(f"{site_name}/{index}")
            if one is None:
                fail("G581", f"no candidate `{site_name}/{index}`", site="targets.yaml",
                     wanted=", ".join(self._candidates) or "a build of `one of`")  # fmt: skip
            ours = [i.name for i in one.of.student.inputs]
            if one.of.exact or [i.name for i in one.site.student.inputs] != ours:
                fail("G582", f"the student's call of `{site_name}` does not fit `{one.candidate.operator}`",
                     site=site_name, wanted=", ".join(one.candidate.inputs), found=", ".join(ours),
                     help="write a file without `one of`; a bank gives the weights")  # fmt: skip
            self.student.set_submodule(one.of.student.output, one.model.get_submodule("operator"))
        for module, rate in self._rates:
            module.p = rate  # type: ignore[assignment]
        return self.student.eval()

    def _task(self) -> Task:
        if self.task is None:
            fail("G231", "no task that draws the model's inputs from DATA", site="load_targets",
                 help="graftc.load_targets(DIR, task = …)")  # fmt: skip
        return self.task
