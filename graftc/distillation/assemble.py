"""A build's student put together from a bank, without training: a finished run of stage 1 in seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftc.diagnostics import Note, fail
from graftc.distillation.bank import Bank, Entry
from graftc.distillation.data import Task
from graftc.distillation.identity import Identity, digest, fingerprint, problems
from graftc.distillation.optim import align
from graftc.distillation.reuse import apart, result_of, state_as_chosen, take
from graftc.distillation.run import Build, RunResult, open_run
from graftc.distillation.targets_file import from_dict


@dataclass(frozen=True)
class Missing:
    """A site that the bank does not have, and how the nearest entry differs."""

    site: str
    why: str


@dataclass(frozen=True)
class Assembly:
    """What a bank has for a build. `run`: the run that was made of it, where it had every site."""

    bank: Path
    found: Mapping[str, Entry]
    missing: tuple[Missing, ...]
    run: RunResult | None


def assemble(
    build: Build,
    bank: str | Path,
    *,
    data: Any = None,
    task: Task | None = None,
    sources: Mapping[str, Any] | None = None,
) -> Assembly:
    """Look every site of a build up in a bank; where all are there, write them as a run of the build.

    Entries are of the same teacher, cut, operator, first weights, loss and budget. With `data` (and
    `task`) they were trained on it; without, all on one DATA, whichever. Among several runs the one with
    the lowest held-out error is taken. Raises GraftError: no bank (G570), damaged (G572), entries
    from several DATA (G574).
    """
    started = time.monotonic()
    opened = Bank.open(bank)
    targets = from_dict(build.targets)
    student = align(build.student())
    known = problems(cast("Any", build), targets, sources)
    own = apart([i for i in known if i.candidate == 0], targets.generations(), student)
    seen = fingerprint(data, task, None) if data is not None and task is not None else None
    entries = opened.entries()
    found: dict[str, Entry] = {}
    missing: list[Missing] = []
    for sites in targets.generations():
        for site in (s for s in sites if not s.exact):
            if site.name not in own:
                missing.append(Missing(site.name, "what it becomes hangs on other sites"))
                continue
            chosen = _choose(own[site.name], entries, seen, [found.get(n) for n in site.after])
            if isinstance(chosen, Entry):
                found[site.name] = chosen
            else:
                missing.append(Missing(site.name, chosen))
    if missing or not found:
        return Assembly(opened.path, found, tuple(missing), None)
    state = state_as_chosen(student)
    for name, entry in found.items():
        take(entry, own[name], state)
    with open_run(build, "distill", options={"seed": None}, sources=sources) as run:
        run.record(bank=str(opened.path), assembled={n: e.key for n, e in found.items()})
        results = [result_of(entry, own[name]) for name, entry in found.items()]
        order = {site.name: i for i, site in enumerate(targets.sites)}
        count = len(results)
        done = run.finish(
            student.state_dict(),
            RunResult(
                id=run.id,
                path=run.path,
                stage="distill",
                weights=run.path / "student.safetensors",
                steps=0,
                seconds=round(time.monotonic() - started, 2),
                sites=tuple(sorted(results, key=lambda r: order[r.name])),
                metrics={
                    "error_start": sum(r.error_start for r in results) / count,
                    "error_end": sum(r.error_end for r in results) / count,
                },
            ),
        )
    return Assembly(opened.path, found, (), done)


def _choose(
    identity: Identity, entries: Sequence[Entry], seen: str | None, inner: Sequence[Entry | None]
) -> Entry | str:
    """The entry to take, or why there is none."""
    key = identity.problem_key
    same = [e for e in entries if e.identity.problem_key == key]
    if not same:
        return _nearest(identity, entries)
    if None in inner:
        return "a site inside it is not in the bank"
    keys = [e.key for e in inner if e is not None]
    same = [e for e in same if _training(e)["after"] == keys]
    if not same:
        return "its entries were trained around other weights of the sites inside it"
    if seen is not None:
        same = [e for e in same if _training(e)["data"] == seen]
        if not same:
            return "its entries were trained on other DATA, or another noise process"
    data = {_training(e)["data"]: e for e in same}
    if len(data) > 1:
        fail("G574", f"the bank has `{identity.site}` trained on {len(data)} different DATA",
             site=identity.site, help="say which: -d DATA",
             notes=tuple(Note(f"{e.source['run']} of {e.source['build']}: {e.source['command']}")
                         for e in data.values()))  # fmt: skip
    return min(same, key=lambda e: (e.error, e.key))


def _training(entry: Entry) -> Mapping[str, Any]:
    return entry.identity.training or {}


_WORDS = {
    "teacher": "the teacher (its code or weights)",
    "cut": "the teacher's cut",
    "init": "the first weights",
    "definition": "the operator",
    "arguments": "the operator's arguments",
    "trains": "what trains",
    "after": "the sites inside it",
}


def _nearest(identity: Identity, entries: Sequence[Entry]) -> str:
    """How the nearest entry of the same place differs."""
    place = identity.problem["cut"]["output"]
    near = [
        _differences(identity.problem, e.identity.problem)
        for e in entries
        if e.identity.problem["cut"]["output"] == place
    ]
    if not near:
        return "the bank has nothing of this place"
    best = min(near, key=len)
    return f"the nearest entry differs in {', '.join(_WORDS.get(n, n) for n in best)}"


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = [*ours, *(n for n in theirs if n not in ours)]
    return [n for n in names if digest(ours.get(n)) != digest(theirs.get(n))]
