"""What a site is fed: the teacher's values, the student's own, or a mix that moves between them.

The target stays the teacher's output on the teacher's inputs, so that a site learns to make up for
what the sites before it have changed (as arXiv 2004.10568, eq. 25, does for quantised layers). A mix
feeds part of each batch its own inputs, a share that moves in a straight line over the site's steps
(scheduled sampling, arXiv 1506.03099).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftc.distillation.activations import Values
from graftc.distillation.cuts import capture_graph
from graftc.distillation.students import Student
from graftc.distillation.targets import Cut


def share_at(student: Student, step: int, steps: int) -> float:
    """The share of a batch that has the student's own inputs at `step` of `steps`."""
    first, last = student.site.student_inputs
    return first + (last - first) * min(1.0, step / max(1, steps - 1))


def ends_with_own(student: Student) -> bool:
    """Whether the site is fed mostly the student's own inputs at the end: it is measured on them."""
    return student.site.student_inputs[1] >= 0.5


class StudentInputs:
    """The inputs of sites as the student model itself has them, from one pass of it.

    `cuts`: where the student model has a site's inputs, by the site's name, if not at its own cut (a
    candidate that stands in a package of its own).
    """

    def __init__(self, model: nn.Module, cuts: Mapping[str, Cut] | None = None) -> None:
        self._model = model
        self._cuts = dict(cuts or {})
        self._captured: tuple[tuple[Cut, ...], Any] | None = None

    def fed(
        self,
        students: Sequence[Student],
        values: Sequence[Values],
        shares: Mapping[str, float],
        inputs: Mapping[str, Tensor],
        part: tuple[range, int] | None = None,
    ) -> list[Values]:
        """`values` with the student's own inputs for the first `share` of the batch, by site name.

        `part`: which rows of a batch of how many these are, if they are not all.
        """
        asking = [s for s in students if shares.get(s.site.name, 0.0) > 0]
        if not asking:
            return list(values)
        own = self._own(asking, inputs)
        return [
            self._mixed(s, v, own[self._cut(s)], shares[s.site.name], part)
            if shares.get(s.site.name, 0.0) > 0
            else v
            for s, v in zip(students, values, strict=True)
        ]

    def _cut(self, student: Student) -> Cut:
        return self._cuts.get(student.site.name, student.site.student)

    def _own(
        self, students: Sequence[Student], inputs: Mapping[str, Tensor]
    ) -> dict[Cut, Sequence[Tensor]]:
        cuts = tuple(
            dict.fromkeys(self._cut(s) for s in students)
        )  # candidates of a site share one
        if self._captured is None or self._captured[0] != cuts:
            self._captured = cuts, capture_graph(self._model, cuts, outputs=False)
        graph = self._captured[1]
        before = [m for m in (graph, *self._model.modules()) if m.training]
        graph.eval()  # dropout is of training, not of a site's input
        with torch.no_grad():
            found = graph(**inputs)
        for module in before:
            module.training = True
        return dict(zip(cuts, found, strict=True))

    def _mixed(
        self,
        student: Student,
        values: Values,
        own: Sequence[Tensor],
        share: float,
        part: tuple[range, int] | None,
    ) -> Values:
        places = {given.name: i for i, given in enumerate(student.site.teacher.inputs)}
        fed = list(values)
        for given, value in zip(self._cut(student).inputs, own, strict=True):
            place, rows = places[given.name], len(value)
            whole, before = rows, 0
            if part is not None:  # a sample may be several rows of a value
                each = rows // len(part[0])
                whole, before = part[1] * each, part[0].start * each
            count = max(0, min(rows, round(share * whole) - before))
            fed[place] = torch.cat([value[:count], values[place][count:]])
        return fed
