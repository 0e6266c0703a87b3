"""Stage 1 with the sites divided among the processes of a job, which train apart and meet after each part.

Each process runs the teacher on whole batches, up to the last of its own sites, and writes a checkpoint of
its own sites. Nothing is exchanged while they train. A resumed run reads all of these checkpoints, so that the
sites may be divided in another way; one that is ahead waits for the others of its process.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from graftc.distillation.checkpoint import load_tensors
from graftc.distillation.generation import Generation, State
from graftc.distillation.optim import Optimiser
from graftc.distillation.run import BRANCH, Branch, SiteResult
from graftc.distillation.saving import under
from graftc.distillation.stage1_run import Stage1Run
from graftc.distillation.students import Student


def divide(units: Sequence[tuple[Collection[str], float]], size: int) -> dict[str, int]:
    """Which process trains which site: neighbours together, so that early sites have a short teacher pass.

    A unit is names that belong together, and what they cost.

    >>> divide([(("a",), 1), (("b", "b/1"), 2), (("c",), 1)], 2)
    {'a': 0, 'b': 0, 'b/1': 0, 'c': 1}
    """
    total, before, owners = sum(cost for _, cost in units) or 1.0, 0.0, dict[str, int]()
    for names, cost in units:
        owners.update(dict.fromkeys(names, min(size - 1, int(size * before / total))))
        before += cost
    return owners


def units_of(
    students: Sequence[Student], names: Collection[str]
) -> list[tuple[tuple[str, ...], float]]:
    """The sites that train, with their candidates and with those that share a parameter with them."""
    made: list[tuple[list[str], set[int], float]] = []
    for student in students:
        name = student.site.name
        if name not in names:
            continue
        base, own = name.partition("/")[0], {id(p) for p in student.region.parameters()}
        cost = float(student.site.sample.student_flops) if student.site.sample else 1.0
        joined = [u for u in made if base in u[0] or u[1] & own]
        together = ([n for u in joined for n in u[0]] + [name],
                    own.union(*(u[1] for u in joined)), cost + sum(u[2] for u in joined))  # fmt: skip
        at = made.index(joined[0]) if joined else len(made)
        made = [u for u in made if u not in joined]
        made.insert(at, together)
    return [(tuple(names), cost) for names, _, cost in made]


class Stage1Sites(Stage1Run):
    """A run in which this process trains its share of each part's sites."""

    keeps_end = True

    def _part(self, at: int, state: State | None, tensors: Mapping[str, Tensor]) -> None:
        names = self.work.trained(at)
        had = self._from_bank(names) if state is None else set(names) - state.start.keys()
        left = [name for name in names if name not in had]
        if not left:
            return
        students = self._students(at)
        owners = divide(units_of(list(students.values()), left), self.team.size)
        self._mine = [name for name in left if owners[name] == self.team.rank]
        if state is None:
            self._open(at)
        found: dict[str, SiteResult] = {}
        steps = 0
        if self._mine:
            own = None if state is None else _only(state, self._mine)
            generation = self.work.generation(at, own, set(names) - set(self._mine))
            generation.partial = generation.partial or len(self._mine) < len(names)
            inside = {n for s in generation.students for n in self._names(s)}
            given = _of(tensors, inside)
            self._train(at, generation, own, given, *self._supply(at, generation))
            found, steps = self._found(generation), generation.state.step
            generation.release()
        else:
            self._supply_of_none(at)
            if state is None:
                self._begun()
        self.team.meet()
        self._merge(left, owners, students, found, steps)

    def _merge(
        self,
        left: Sequence[str],
        owners: Mapping[str, int],
        students: Mapping[str, Student],
        found: Mapping[str, SiteResult],
        steps: int,
    ) -> None:
        """Give every process what each site became; rank 0 writes it down."""
        for rank in range(self.team.size):
            for line in self.team.share(self._told(), rank):
                self.run.log(**line)
        self._forget()
        row = [float(steps) if rank == self.team.rank else 0.0 for rank in range(self.team.size)]
        self.steps += int(max(self.team.total([row])[0]))
        for name in left:
            plain = asdict(found[name]) if name in found else None
            result = SiteResult(**self.team.share(plain, owners[name]))
            tensors = [self.tensors[n] for n in self._names(students[name])]
            self.team.spread(tensors, owners[name])
            self._tell(name, result)

    def _students(self, at: int) -> dict[str, Student]:
        number, _ = self.work.parts[at]
        return {s.site.name: s for s in self.work.students(self.work.generations[number])}

    def _names(self, student: Student) -> list[str]:
        """The names of all tensors of a site's region that training may change."""
        inside = {id(t) for t in (*student.region.parameters(), *student.region.buffers())}
        return [name for name, tensor in self.tensors.items() if id(tensor) in inside]

    def _supply_of_none(self, at: int) -> None:
        """Follow what the others of the job tell each other while they choose their window."""
        if self.planned:
            windows: dict[str, list[int]] = dict(self.run.facts.get("windows") or {})
            self.run.record(windows={**windows, str(at): self.team.share()})

    # -- log and checkpoint -----------------------------------------------------------------

    def _told(self) -> list[dict[str, Any]]:
        """The lines that are not in the run's log yet: a rank's own, or those of ranks that are no more."""
        return self.run.lines if isinstance(self.run, Branch) else self._carried

    def _forget(self) -> None:
        if isinstance(self.run, Branch):
            self.run.lines.clear()
        self._carried = []

    def _begun(self) -> None:
        # From here on all of them have a checkpoint of this part, or it is begun anew.
        self.team.meet()

    def _open(self, at: int) -> None:
        """Write down that the part begins, with all that the parts before it made."""
        if self.team.first:
            tensors = {f"model.{name}": value for name, value in self.tensors.items()}
            self.run.save(tensors, {**self._facts(at), "state": None, "lines": []})
        self.team.barrier()

    def _save(self, part: int, generation: Generation, optimiser: Optimiser) -> None:
        names = {n for s in generation.students for n in self._names(s)}
        kept = self.tensors if self.team.first else {n: self.tensors[n] for n in sorted(names)}
        tensors = {f"model.{name}": value for name, value in kept.items()}
        tensors.update({f"best.{name}": value for name, value in generation.best.items()})
        tensors.update({f"optimiser.{name}": value for name, value in optimiser.state().items()})
        facts = {**self._facts(part), "state": generation.state.to_dict(), "lines": self._told()}
        self.run.save(tensors, facts)

    def _load(self) -> tuple[int, State | None, dict[str, Tensor]]:
        self._carried: list[dict[str, Any]] = []  # every run begins here
        found = self.run.load()
        others = [load_tensors(p) for p in sorted(self.run.path.glob(f"{BRANCH}*.safetensors"))]
        self.team.barrier()  # all have read before any writes
        if found is None:
            return 0, None, {}
        tensors, facts = found
        part = int(facts["part"])
        results = [SiteResult(**r) for r in facts["results"]]
        self.results = {r.key: r for r in results}
        self.steps, self.seconds = facts["steps"], facts["seconds"]
        students = self._students(part)
        left = {n for n in self.work.trained(part) if n not in self.results}
        pieces = [p for p in (found, *others) if p[1]["part"] == part and p[1]["state"]]
        state, owner = _joined([State.from_dict(p[1]["state"]) for p in pieces], left)
        unfinished = {n for name in left for n in self._names(students[name])}
        with torch.no_grad():
            for name, value in under(tensors, "model.").items():
                if name not in unfinished:
                    self.tensors[name].copy_(value)
        made: dict[str, Tensor] = {}
        for name, index in owner.items():
            made |= _of(pieces[index][0], set(self._names(students[name])))
        with torch.no_grad():
            for name, value in under(made, "model.").items():
                self.tensors[name].copy_(value)
        if self.team.first and state is not None:
            lines = {json.dumps(line): line for p in pieces for line in p[1]["lines"]}
            self._carried = list(lines.values())
        return part, state, made


def _joined(states: Sequence[State], names: Collection[str]) -> tuple[State | None, dict[str, int]]:
    """One state of sites whose processes stood at different steps, and which of `states` each is from.

    None where a site of `names` has none: then nothing of the part is kept.
    """
    owner: dict[str, int] = {}
    ahead: dict[str, int] = {}
    for index, state in enumerate(states):
        for name in state.start:
            step = max(state.step, state.ahead.get(name, 0))
            if name in names and step > ahead.get(name, -1):
                owner[name], ahead[name] = index, step
    if set(owner) != set(names):
        return None, {}
    whole = State(step=min(ahead.values()), ahead=ahead)
    for index, state in enumerate(states):
        part = _only(state, [n for n in owner if owner[n] == index])
        for mine, theirs in zip(_tables(whole), _tables(part), strict=True):
            mine.update(theirs)
        whole.stacks += part.stacks
    return whole, owner


def _tables(state: State) -> tuple[dict[str, Any], ...]:
    """What a state keeps by site, but for how far each is."""
    return state.scales, state.start, state.best, state.skipped, state.waited, state.stopped


def _only(state: State, names: Collection[str]) -> State:
    """What a state says of some of its sites."""
    made = State(step=max(state.step, min((state.ahead.get(n, 0) for n in names), default=0)))
    made.ahead = {n: step for n, step in state.ahead.items() if n in names}
    for ours, all_of in zip(_tables(made), _tables(state), strict=True):
        ours.update({n: value for n, value in all_of.items() if n in names})
    groups = [[n for n in group if n in names] for group in state.stacks]
    made.stacks = [group for group in groups if len(group) > 1]
    return made


def _of(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The entries `model.NAME`, `best.NAME` and `optimiser.NAME.KEY` of these names."""
    found: dict[str, Tensor] = {}
    for full, value in tensors.items():
        kind, _, name = full.partition(".")
        if (name.rpartition(".")[0] if kind == "optimiser" else name) in names:
            found[full] = value
    return found
