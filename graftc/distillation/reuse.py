"""A run of stage 1 and a bank: what is there is not trained again, what is trained is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.distillation.bank import Bank, Entry
from graftc.distillation.candidates import OPERATOR, Loaded
from graftc.distillation.data import Task
from graftc.distillation.identity import Identity, fingerprint, problems, trained
from graftc.distillation.run import Run, SiteResult
from graftc.distillation.students import is_under
from graftc.distillation.targets import Targets

_RESULT = ("error_start", "error_end", "loss_start", "loss_end", "steps", "skipped_steps", "bins")


@dataclass(frozen=True)
class Reuse:
    """The bank as one run sees it: the identities of what it trains, by the names that stage 1 uses.

    `source` says in each new entry where it came from.
    """

    bank: Bank
    identities: Mapping[str, Identity]
    source: Mapping[str, Any]

    def entry(self, name: str) -> Entry | None:
        identity = self.identities.get(name)
        return None if identity is None else self.bank.find(identity.key)

    def store(self, result: SiteResult, tensors: Mapping[str, Tensor]) -> None:
        """Write a trained site. Raises GraftError where there is no room; the run's checkpoint is whole."""
        identity = self.identities.get(result.key)
        if identity is None:
            return
        own = {n: t for n, t in tensors.items() if belongs(identity, n)}
        said = {name: getattr(result, name) for name in _RESULT}
        try:
            self.bank.add(identity, own, said, self.source)
        except GraftError as error:
            note = Note(f"the run {self.source['run']} is whole: resume it once there is room, nothing is trained twice")  # fmt: skip
            raise GraftError(*(_with_note(d, note) for d in error.diagnostics)) from error


def _with_note(diagnostic: Diagnostic, note: Note) -> Diagnostic:
    return replace(diagnostic, notes=(*diagnostic.notes, note))


def belongs(identity: Identity, name: str) -> bool:
    """Whether a tensor of the student is the site's own: it trains, or it is new."""
    new = {weight[0] for weight in identity.problem["init"]["weights"]}
    return name in new or is_under(name, identity.problem["trains"])


def state_as_chosen(student: nn.Module, candidate: Loaded | None = None) -> dict[str, Tensor]:
    """A model's state by names in the student; of a candidate, as if it were the student's."""
    if candidate is None:
        return dict(student.state_dict(keep_vars=True))
    state = candidate.model.state_dict(keep_vars=True)
    path = candidate.of.teacher.output
    return {path + n.removeprefix(OPERATOR): t for n, t in state.items()}


def take(entry: Entry, identity: Identity, state: Mapping[str, Tensor]) -> None:
    """Copy an entry's weights into a model's state. Raises GraftError (G573) where they do not fit."""
    tensors = entry.tensors()
    wanted = {n: t for n, t in state.items() if belongs(identity, n)}
    odd = sorted(tensors.keys() ^ wanted.keys())
    odd += [n for n in tensors.keys() & wanted.keys() if tensors[n].shape != wanted[n].shape]
    if odd:
        fail("G573", f"an entry of the bank does not fit `{identity.site}`", site=str(entry.path),
             found=f"`{odd[0]}` is in one of the two only, or of another shape",
             help="graftc bank DIR prune --site SITE, then distill again")  # fmt: skip
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)


def result_of(entry: Entry, identity: Identity) -> SiteResult:
    """What a run says of a site that it took from a bank."""
    kept = {name: entry.result[name] for name in _RESULT if name != "steps"}
    return SiteResult(
        identity.site, identity.operator, steps=0, candidate=identity.candidate,
        reused=origin_of(entry), **kept,
    )  # fmt: skip


def origin_of(entry: Entry) -> str:
    """`bank entry 3f2a…, run 0001-distill of /builds/hyena`."""
    return f"bank entry {entry.key[:12]}, run {entry.source['run']} of {entry.source['build']}"


def reuse_of(
    bank: str | Path,
    build: Any,
    targets: Targets,
    run: Run,
    student: nn.Module,
    *,
    data: Any,
    task: Task,
    size: int | None,
    validation: Any = None,
) -> Reuse:
    """A bank (made where there is none) for a run of a build. Raises GraftError (G570, G571, G575)."""
    opened = Bank.open(bank, create=True)
    if not hasattr(build, "manifest"):
        fail("G575", "this build does not say which teacher it was made of", site=str(build.path),
             help="a bank is for builds that `graftc compile` wrote")  # fmt: skip
    sources = run.facts.get("sources")
    known = problems(build, targets, sources)
    seen = fingerprint(data, task, validation)
    made = trained(known, targets, data=seen, size=size, options=run.options)
    source = {
        "run": run.id,
        "build": str(Path(build.path).absolute()),
        "command": (sources or {}).get("command", ""),
        "versions": run.facts["versions"],
    }
    return Reuse(opened, apart(made, targets.generations(), student), source)


def apart(
    identities: Sequence[Identity],
    generations: Sequence[Sequence[Any]],
    student: nn.Module,
) -> dict[str, Identity]:
    """The identities by name, without sites that train a parameter that another of their generation uses.

    What such a site becomes hangs on the other, so that it is no content of its own.
    """
    names = list(student.state_dict())
    by_name = {i.name: i for i in identities}
    left = dict(by_name)
    for sites in generations:
        owners: dict[str, str] = {}
        for site in sites:
            if (identity := by_name.get(site.name)) is None:
                continue
            for name in (n for n in names if belongs(identity, n)):
                other = owners.setdefault(name, site.name)
                if other != site.name:
                    left.pop(other, None)
                    left.pop(site.name, None)
    return left
