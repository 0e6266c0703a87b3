"""The candidates of `one of` that are not in the student: students of their own at the site's cut.

A candidate trains exactly as a site does, under the name `SITE/N`: it is fed by the same teacher pass,
and has its own first weights to solve, optimiser group, errors and best weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from graftc.diagnostics import fail
from graftc.distillation.checkpoint import save_tensors
from graftc.distillation.optim import align
from graftc.distillation.run import Build
from graftc.distillation.students import Student, students_of
from graftc.distillation.targets import Candidate, Cut, CutInput, Site

OPERATOR = "operator"
"""The path of the operator in a candidate's package."""


@dataclass(frozen=True)
class Loaded:
    """A candidate as it is trained: the site it belongs to, its number, its package's model."""

    of: Site
    index: int
    model: nn.Module

    @property
    def candidate(self) -> Candidate:
        return self.of.candidates[self.index]

    @property
    def site(self) -> Site:
        """The site that this candidate is, to whatever trains sites."""
        return candidate_site(self.of, self.index)


def candidate_name(site: str, index: int) -> str:
    """What logs, checkpoints and progress call a candidate; the student's own is called as the site."""
    return f"{site}/{index}" if index else site


def candidate_site(site: Site, index: int) -> Site:
    """A candidate as a site: the teacher's cut, loss and budget are the site's, the rest its own."""
    own = site.candidates[index]
    names = own.inputs or tuple(i.name for i in site.student.inputs)
    inputs = (CutInput(names[0], OPERATOR, 0), *(CutInput(n, OPERATOR, n) for n in names[1:]))
    return replace(
        site,
        name=candidate_name(site.name, index),
        student=Cut("", inputs, OPERATOR),
        trainable=own.trainable or (OPERATOR,),
        operator=own.operator,
        pending=own.pending,
        exact=False,
        candidates=(),
        arguments=own.arguments,
        definition=own.definition,
        init=own.init,
        sample=own.sample,
    )


def load_candidates(build: Build, sites: Iterable[Site], device: str = "cpu") -> list[Loaded]:
    """Every candidate of the sites that has a package, with its first weights."""
    return [
        Loaded(site, index, align(build.candidate(own.package)).to(device).train())
        for site in sites
        for index, own in enumerate(site.candidates)
        if own.package is not None
    ]


def candidate_students(loaded: Sequence[Loaded]) -> tuple[Student, ...]:
    """The students of candidates; their parameters are called `SITE/N:operator.…`."""
    made: list[Student] = []
    for one in loaded:
        (student,) = students_of(one.model, [one.site])
        named = {f"{one.site.name}:{n}": p for n, p in student.parameters.items()}
        made.append(replace(student, parameters=named))
    return tuple(made)


def weights_path(run: Path, site: str, index: int) -> Path:
    """Where a run keeps a candidate's trained weights."""
    return run / "candidates" / site / f"{index}.safetensors"


def save_candidates(run: Path, loaded: Iterable[Loaded]) -> None:
    """Write each candidate's trained state into the run. Raises GraftError (G550) where there is no room."""
    for one in loaded:
        path = weights_path(run, one.of.name, one.index)
        facts = {"run": run.name, "site": one.of.name, "candidate": one.index}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail("G550", f"cannot create `{path.parent}`: {error}", site=str(path.parent))
        save_tensors(path, one.model.state_dict(), facts)
