"""What is measured on the held-out samples: scales of targets, errors and losses, errors by bins of time.

Each process of a job takes its share of the samples; what is told are sums over all of them, so that every
process decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftc.distillation.activations import Teacher, Values
from graftc.distillation.bins import BinSums, edges_of, times_of
from graftc.distillation.buffer import paged
from graftc.distillation.loss import Moments, Scale, change_from, counted, squared_error
from graftc.distillation.ranks import Ranks
from graftc.distillation.student_inputs import StudentInputs, ends_with_own
from graftc.distillation.students import Student, check_teacher, cuts_of

if TYPE_CHECKING:
    from graftc.distillation.generation import Setting

HELD_MEMORY = 256 * 2**20
"""Bytes of held-out activations that are kept, to spare the teacher's pass at each validation."""

_FEWEST = 2


class HeldOut:
    """The held-out samples of a run, in batches, with the teacher's values."""

    def __init__(
        self, setting: Setting, teacher: Teacher, batch: int, own: StudentInputs | None
    ) -> None:
        self._setting, self._teacher, self._own = setting, teacher, own
        self._ranks = setting.ranks
        count = len(setting.data.held_out)
        self._chunks, self._factor = shares(count, batch, setting.ranks)
        self._held: dict[str, list[Values]] = {}
        self._prepared: list[Any] = []

    def _batches(self) -> Iterator[Any]:
        data, task = self._setting.data, self._setting.task
        for rows in self._chunks:
            yield from data.validation(task, len(rows), rows)

    def prepared(self) -> list[Any]:
        """The batches as the task prepared them."""
        if not self._prepared:
            self._prepared = [p.to(self._setting.device) for p in self._batches()]
        return self._prepared

    def values(self, students: Sequence[Student]) -> Iterator[tuple[str, list[Values]]]:
        """Each batch's name and the teacher's values, kept in memory where they fit."""
        names = [s.site.name for s in students]
        if all(name in self._held for name in names):
            for i, values in enumerate(zip(*(self._held[name] for name in names), strict=True)):
                yield f"held-out batch {i}", list(values)
            return
        size, kept = 0, list[list[Values]]()
        for i, prepared in enumerate(self._batches()):
            where = f"held-out batch {i}"
            values = list(self._teacher.run(cuts_of(students), prepared, where).values)
            size += sum(v.nbytes for given in values for v in given)
            if size <= HELD_MEMORY:
                kept.append([[paged(v) for v in given] for given in values])
            yield where, values
        # All processes keep theirs, or none: they may have to run the teacher together.
        if not self._ranks.total([[float(size > HELD_MEMORY)]])[0][0]:
            columns = map(list, zip(*kept, strict=True))
            self._held.update(zip(names, columns, strict=True))

    def fed(self, students: Sequence[Student]) -> Iterator[list[Values]]:
        """The values that students are measured on: the teacher's, or the student's own inputs."""
        own = {s.site.name: 1.0 for s in students if ends_with_own(s)}
        if not own or self._own is None:
            yield from (values for _, values in self.values(students))
            return
        for (_, values), prepared in zip(self.values(students), self.prepared(), strict=True):
            yield self._own.fed(students, values, own, prepared.inputs)

    def _total(self, table: Sequence[Sequence[float]]) -> list[list[float]]:
        return self._ranks.total([[self._factor * x for x in row] for row in table])

    def scales(self, students: Sequence[Student], limits: Mapping[str, float]) -> dict[str, Scale]:
        """What the targets measure, each weighted by its gate, within its limit."""
        sums = {s.site.name: Moments() for s in students}
        for where, values in self.values(students):
            check_teacher(students, values, where)
            for student, given in zip(students, values, strict=True):
                name = student.site.name
                sums[name].add(student.weighed(given[-1], given), limits.get(name))
        found = self._total([moments.sums() for moments in sums.values()])
        return {n: Moments.of(row).scale() for n, row in zip(sums, found, strict=True)}

    def changes(self, students: Sequence[Student]) -> dict[str, float]:
        """The share of each target's energy by which it changes from the first sample on: 0 for a constant."""
        first: dict[str, torch.Tensor] = {}
        sums = {s.site.name: [0.0, 0.0] for s in students}
        for _, values in self.values(students):
            pairs = zip(students, values, strict=True)
            targets = {s.site.name: s.weighed(given[-1], given) for s, given in pairs}
            if not first:
                first = {name: target[0].clone() for name, target in targets.items()}
                self._ranks.spread(list(first.values()))
            for name, target in targets.items():
                sums[name][0] += change_from(first[name], target)
                sums[name][1] += squared_error(target, target)[1]
        found = self._total(list(sums.values()))
        return {n: change / energy for n, (change, energy) in zip(sums, found, strict=True)}

    def measure(
        self, students: Sequence[Student], scales: Mapping[str, Scale]
    ) -> dict[str, tuple[float, float]]:
        """(error, loss) of each student over the held-out samples."""
        sums = {s.site.name: [0.0, 0.0, 0.0, 0.0] for s in students}
        for values in self.fed(students):
            for student, given in zip(students, values, strict=True):
                name = student.site.name
                student.region.eval()
                with torch.no_grad():
                    output = student.region(*student.inputs(given))
                    loss = student.loss(output, given, scales[name])
                student.region.train()
                error, energy, _, _ = squared_error(output, given[-1])
                count = int(counted(student.weighed(given[-1], given), scales[name]))
                row = sums[name]
                row[0], row[1] = row[0] + error, row[1] + energy
                row[2], row[3] = row[2] + float(loss) * count, row[3] + count
        found = self._total(list(sums.values()))
        return {
            n: (error / energy, loss / count)
            for n, (error, energy, loss, count) in zip(sums, found, strict=True)
        }

    def bins(self, students: Sequence[Student]) -> dict[str, dict[str, list[float]]]:
        """Errors by bins of the task's time; nothing where the task has none."""
        held = [times_of(p, self._setting.inputs) for p in self.prepared()]
        times = [t for t in held if t is not None]
        if len(times) < len(held):
            return {}
        bounds = getattr(self._setting.task, "time_range", None)
        edges = edges_of(self._everyone(torch.cat(times)), bounds)
        sums = {s.site.name: BinSums(edges) for s in students}
        apart = dict.fromkeys(sums, 1.0)
        for when, values in zip(times, self.fed(students), strict=True):
            for student, given in zip(students, values, strict=True):
                student.region.eval()
                with torch.no_grad():
                    output = student.region(*student.inputs(given))
                student.region.train()
                name = student.site.name
                if not sums[name].add(when, output, given[-1]):
                    apart[name] = 0.0
        told = self._total([[*sums[n].sums(), apart[n]] for n in sums])
        everyone = self._total([[1.0]])[0][0]
        return {
            n: {"edges": edges, "errors": BinSums.of(edges, row[:-1]).errors()}
            for n, row in zip(sums, told, strict=True)
            if row[-1] == everyone
        }

    def _everyone(self, times: torch.Tensor) -> torch.Tensor:
        """The times of all held-out samples, in order."""
        row = [0.0] * len(self._setting.data.held_out)
        for place, time in zip((i for c in self._chunks for i in c), times.tolist(), strict=True):
            row[place] = time
        return torch.tensor(self._total([row])[0], dtype=torch.float64)

    def clear(self) -> None:
        """Let go of what is kept."""
        self._held.clear()
        self._prepared.clear()


def shares(count: int, batch: int, ranks: Ranks) -> tuple[list[range], float]:
    """The batches of this process, as rows of the held-out samples, and what its sums count.

    Every process has as many batches, none empty. Where there are fewer samples than processes, each
    measures all, and those of the first count.
    """
    if ranks.size == 1 or count < ranks.size:
        whole = [range(at, min(at + batch, count)) for at in range(0, count, batch)]
        return whole, float(ranks.first)
    most = math.ceil(count / ranks.size)
    number = math.ceil(most / max(_FEWEST, math.ceil(batch / ranks.size)))
    rows = ranks.rows(count)
    cut = [rows.start + len(rows) * i // number for i in range(number + 1)]
    return [range(cut[i], cut[i + 1]) for i in range(number)], 1.0
