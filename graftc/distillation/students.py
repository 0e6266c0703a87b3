"""The students of one generation: each site's region with its trainable parameters and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from graftc.diagnostics import Note, fail, nearest
from graftc.distillation.activations import Values
from graftc.distillation.cuts import extract
from graftc.distillation.loss import Scale, finite, regression
from graftc.distillation.optim import named
from graftc.distillation.stacked import Stack
from graftc.distillation.targets import Cut, Site


@dataclass(frozen=True)
class Student:
    """A site in training. `order[i]` is the place, among the teacher's values, of input i."""

    site: Site
    region: nn.Module
    order: tuple[int, ...]
    parameters: Mapping[str, nn.Parameter]

    def inputs(self, values: Values) -> tuple[Tensor, ...]:
        return tuple(values[i] for i in self.order)

    def weighed(self, tensor: Tensor, values: Values) -> Tensor:
        """A target or an output, times the gate that follows the site where the loss is weighted by it."""
        return tensor * values[-2] if self.site.teacher.gate else tensor

    def loss(self, output: Tensor, values: Values, scale: Scale) -> Tensor:
        """The site's loss without its weight."""
        target = values[-1]
        if output.shape != target.shape:
            fail("G541", f"the student of `{self.site.name}` returns another shape than the teacher",
                 site=self.site.name, wanted=str(list(target.shape)),
                 found=str(list(output.shape)))  # fmt: skip
        return regression(
            self.weighed(output, values), self.weighed(target, values), self.site.loss, scale
        )


def students_of(model: nn.Module, sites: Sequence[Site]) -> tuple[Student, ...]:
    """The sites' students inside the model `model`; a parameter of two sites belongs to the first.

    A parameter that takes no gradient (a fixed table) is not trained.
    Raises GraftError where a cut is not in the model (see `extract`), or a site would train
    nothing (G542).
    """
    names = {id(p): name for name, p in named(model.named_parameters(remove_duplicate=False))}
    taken: set[int] = set()
    made: list[Student] = []
    for site in sites:
        region = extract(model, site.student)
        places = {given.name: i for i, given in enumerate(site.teacher.inputs)}
        inside = {id(p): p for p in region.parameters()}
        free = {
            names[key]: p
            for key, p in inside.items()
            if is_under(names[key], site.trainable) and key not in taken
        }
        chosen = {name: p for name, p in free.items() if p.requires_grad}
        if not free and not site.exact:
            found = [names[key] for key in inside]
            near = nearest(site.trainable[0], found)
            fail("G542", f"`{site.name}` has no parameter to train", site=site.name,
                 wanted=", ".join(site.trainable),
                 found="all of them belong to another site" if taken & set(inside) else
                 ", ".join(found[:6]) or "a region without parameters",
                 help=f"is it `{near}`?" if near else None)  # fmt: skip
        taken |= {id(p) for p in chosen.values()}
        order = tuple(places[given.name] for given in site.student.inputs)
        made.append(Student(site, region, order, chosen))
    return tuple(made)


def trainable_names(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The parameters of `model` that any of the sites trains, in the model's order."""
    prefixes = [prefix for site in sites for prefix in site.trainable]
    return [n for n, _ in named(model.named_parameters()) if is_under(n, prefixes)]


def is_under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a parameter's name is one of the prefixes, or inside one ('' is everything)."""
    return any(p in ("", name) or name.startswith(p + ".") for p in prefixes)


def losses(
    students: Sequence[Student],
    values: Sequence[Values],
    scales: Mapping[str, Scale],
    stacks: Sequence[Stack] = (),
) -> list[Tensor]:
    """Each student's loss on the teacher's values, in the order of `students`."""
    outputs: dict[str, Tensor] = {}
    given = {s.site.name: s.inputs(v) for s, v in zip(students, values, strict=True)}
    for stack in stacks:
        outputs.update(stack(given))
    for student in students:
        name = student.site.name
        if name not in outputs:
            outputs[name] = student.region(*given[name])
    return [
        s.loss(outputs[s.site.name], v, scales[s.site.name])
        for s, v in zip(students, values, strict=True)
    ]


def cuts_of(students: Sequence[Student]) -> tuple[Cut, ...]:
    """The teacher's cuts that the students are trained on."""
    return tuple(s.site.teacher for s in students)


def check_teacher(students: Sequence[Student], values: Sequence[Values], where: str) -> None:
    """Refuse to train on a teacher that emits NaN or Inf."""
    for student, given in zip(students, values, strict=True):
        cut = student.site.teacher
        bad = [i.name for i, v in zip(cut.inputs, given, strict=False) if not finite(v)]
        if bad or not finite(given[-1]):
            found = f"NaN or Inf in {', '.join(f'input `{n}`' for n in bad) or 'its output'}"
            fail("G546", f"the teacher gives no finite values at `{student.site.name}`, {where}",
                 site=student.site.name, found=found,
                 notes=(Note("the last checkpoint is whole"),),
                 help="look at DATA for this batch, at the teacher's weights, "
                      "or at its precision")  # fmt: skip
