"""The work of stage 1: its parts in order, each made into a `Generation` when its turn comes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from graftc.diagnostics import Diagnostic
from graftc.distillation.budget import Plan, samples_of, site_plans
from graftc.distillation.candidates import Loaded, candidate_students, load_candidates
from graftc.distillation.data import Data, Task, open_data
from graftc.distillation.few import few_samples
from graftc.distillation.generation import Generation, Setting, State
from graftc.distillation.optim import align
from graftc.distillation.pieces import in_pieces
from graftc.distillation.ranks import ALONE, Ranks
from graftc.distillation.run import Build
from graftc.distillation.scopes import without_dropout
from graftc.distillation.student_inputs import StudentInputs
from graftc.distillation.students import Student, students_of
from graftc.distillation.targets import Site, Targets


class Work:
    """Teacher, student and candidates in memory, and what trains when.

    A part is a generation of sites, which train together; site by site, it is one site of it. The
    sites of a part have the noise, the batches and the schedule that they have in the whole generation.
    """

    def __init__(
        self,
        targets: Targets,
        setting: Setting,
        student: nn.Module,
        candidates: Sequence[Loaded],
        options: Mapping[str, Any],
    ) -> None:
        self.targets, self.setting, self.options = targets, setting, options
        self.student = student.train()
        without_dropout(self.student)
        self.candidates = {one.site.name: one for one in candidates}
        self.generations = targets.generations()
        self.parts: tuple[tuple[int, tuple[Site, ...]], ...] = tuple(
            (number, part)
            for number, sites in enumerate(self.generations)
            for part in ([(s,) for s in sites] if options["site_by_site"] else [sites])
        )

    def names(self, site: Site) -> list[str]:
        """A site's own name, and those of its candidates."""
        return [site.name, *(n for n, one in self.candidates.items() if one.of.name == site.name)]

    def students(self, sites: Sequence[Site]) -> tuple[Student, ...]:
        """What trains of a generation: the sites in the student, then their other candidates."""
        chosen = {name for site in sites for name in self.names(site)}
        others = [one for name, one in self.candidates.items() if name in chosen]
        return (*students_of(self.student, sites), *candidate_students(others))

    def trained(self, part: int) -> list[str]:
        """The names of what trains in a part."""
        return [name for site in self.parts[part][1] for name in self.names(site)]

    def _plans(self, sites: Sequence[Site]) -> dict[str, Plan]:
        given = {name: self.options[name] for name in ("steps", "batch", "lr")}
        return site_plans(sites, self.setting.data.size, **given)

    def warnings(self) -> tuple[Diagnostic, ...]:
        """What to know of DATA before anything is trained."""
        plans = [p for sites in self.generations for p in self._plans(sites).values() if p.steps]
        batch = max((p.batch for p in plans), default=1)
        return few_samples(self.setting.data, batch) if plans else ()

    def generation(
        self, part: int, state: State | None = None, without: Collection[str] = ()
    ) -> Generation:
        """A part, ready to be trained; `without` what is trained already."""
        number, chosen = self.parts[part]
        sites = self.generations[number]
        plans = self._plans(sites)
        for name, one in self.candidates.items():
            if one.of.name in plans:
                plans[name] = plans[one.of.name]
        wanted = set(self.trained(part)) - set(without)
        students = [s for s in self.students(sites) if s.site.name in wanted]
        whole = max(plan.steps for plan in plans.values())
        cuts = {name: one.of.student for name, one in self.candidates.items()}
        own = StudentInputs(self.student, cuts)
        made = Generation(self.setting, number, students, plans, state, own=own, whole=whole)
        made.partial = len(chosen) < len(sites)
        return made


def open_work(
    build: Build,
    targets: Targets,
    data: Any,
    task: Task,
    options: Mapping[str, Any],
    *,
    validation: Any = None,
    device: str = "cpu",
    compile: bool = False,
    ranks: Ranks = ALONE,
    pieces: bool = False,
) -> Work:
    """Load a build and open DATA; `options` are those of a run. `ranks` share each batch, and the teacher in `pieces`."""
    share, count = samples_of(targets.sites)
    source: Data = open_data(
        data,
        seed=options["seed"],
        fraction=share,
        samples=options["samples"] or count,
        validation=validation,
    )
    teacher = align(build.teacher()).eval()
    if pieces:
        teacher = in_pieces(teacher, ranks, [s.teacher for s in targets.sites], frozen=True).module
    setting = Setting(
        teacher.to(device),
        targets.inputs,
        source,
        task,
        options["seed"],
        options["optimiser"],
        options["stacked"],
        device,
        compile,
        ranks,
    )
    student = align(build.student()).to(device)
    loaded = load_candidates(build, targets.sites, device)
    return Work(targets, setting, student, loaded, options)
