"""Training of one generation of sites: one teacher pass and one optimiser step a batch for all."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import fail
from graftc.distillation.activations import Activations, Batch, Streaming, Teacher, Values
from graftc.distillation.budget import Plan
from graftc.distillation.data import Data, Task
from graftc.distillation.held_out import HeldOut
from graftc.distillation.loss import CONSTANT, Scale, counted
from graftc.distillation.optim import (
    Group,
    Kind,
    Optimiser,
    Schedule,
    clip_or_drop,
    gradient_norm,
)
from graftc.distillation.ranks import ALONE, Ranks
from graftc.distillation.scopes import (
    give_back_freed_memory,
    keeping_freed_memory,
    random_of,
    training_only,
)
from graftc.distillation.stacked import Mode, Stack, alike, decide
from graftc.distillation.student_inputs import StudentInputs, share_at
from graftc.distillation.students import Student, check_teacher, cuts_of, losses
from graftc.distillation.targets import ModelInput, Site

ZERO = 1e-6
"""A relative error up to which a site counts as exact from the start, and is not trained."""

CLIP = 1.0
WARMUP = 0.05

_VALIDATIONS = 8
_HOPELESS = 50


@dataclass
class State:
    """Where a generation stands: everything but tensors that a resumed run needs."""

    step: int = 0
    scales: dict[str, Scale] = field(default_factory=dict[str, Scale])
    start: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    best: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    stacks: list[list[str]] = field(default_factory=list[list[str]])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    waited: dict[str, int] = field(default_factory=dict[str, int])
    stopped: dict[str, int] = field(default_factory=dict[str, int])
    ahead: dict[str, int] = field(default_factory=dict[str, int])
    """Sites that did the steps up to a later one in another process, before the run was resumed."""

    def to_dict(self) -> dict[str, Any]:
        scales = {name: list(vars(s).values()) for name, s in self.scales.items()}
        return {**vars(self), "scales": scales}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> State:
        made = State(**data)
        made.scales = {name: Scale(*pair) for name, pair in data["scales"].items()}
        made.start = {name: (pair[0], pair[1]) for name, pair in data["start"].items()}
        made.best = {name: (pair[0], pair[1]) for name, pair in data["best"].items()}
        return made


@dataclass(frozen=True)
class Setting:
    """What stays the same through a run of stage 1. `ranks` share each batch among them."""

    teacher: nn.Module
    inputs: tuple[ModelInput, ...]
    data: Data
    task: Task
    seed: int
    optimiser: Kind
    stacked: Mode
    device: str = "cpu"
    compile: bool = False
    ranks: Ranks = ALONE


class Generation:
    """Sites that need no other site of their generation, and the state of their training.

    Where they are a part of a generation, `whole` is its number of steps: it says when errors are measured.
    """

    def __init__(
        self,
        setting: Setting,
        number: int,
        students: Sequence[Student],
        plans: Mapping[str, Plan],
        state: State | None = None,
        activations: Activations | None = None,
        own: StudentInputs | None = None,
        whole: int | None = None,
    ) -> None:
        self.setting = setting
        self.number = number
        self.students = tuple(students)
        self.plans = plans
        self.state = state or State()
        self.best: dict[str, Tensor] = {}
        self.batch = next(iter(plans.values())).batch
        self.rows = setting.ranks.rows(self.batch)
        self.teacher = Teacher(
            setting.teacher, setting.inputs, setting.device, compile=setting.compile
        )
        self.activations = activations or Streaming(
            self.teacher, lambda step: self.train_batch(step, self.phase)
        )
        self._whole = whole
        self.partial = False
        """Whether these are some sites of a generation."""
        self._in_a_row: dict[str, int] = {}
        self._own = own
        self.held_out = HeldOut(setting, self.teacher, self.batch, own)

    # -- the teacher ------------------------------------------------------------------------

    def values(self, students: Sequence[Student], prepared: Any, where: str) -> list[Values]:
        """The teacher's values of the students' cuts on one batch; the graph ends at the last."""
        return list(self.teacher.run(cuts_of(students), prepared, where).values)

    def taken(self, students: Sequence[Student], step: int) -> Batch:
        """The batch of a training step: the one place where its teacher values come from."""
        return self.activations.at(cuts_of(students), step)

    def train_batch(self, step: int, phase: str, *, whole: bool = False) -> Any:
        """A step's batch, or with several processes this one's rows of it."""
        rows = None if whole else self.rows
        return self.setting.data.prepared(self.setting.task, step, self.batch, phase, rows)

    # -- before training --------------------------------------------------------------------

    def measure_scales(self) -> None:
        """Mean |t| and mean t² of each site's target. Raises GraftError for one that is 0 (G543) or constant (G569)."""
        scales = self.held_out.scales(self.students, {})
        for name, scale in scales.items():
            if not scale.energy > 0:
                fail("G543", f"the teacher's output at `{name}` is zero on every held-out sample",
                     site=name, found="nothing to distil",
                     help="leave the site out of the rule, or remove it")  # fmt: skip
        changes = self.held_out.changes(self.students)
        for name, change in changes.items() if len(self.setting.data.held_out) > 1 else ():
            if change <= CONSTANT:
                fail("G569", f"the teacher's output at `{name}` is the same for every held-out sample",
                     site=name, found="a constant, which no input changes",
                     help="leave the site out of the rule; or DATA repeats one sample, or the teacher's "
                          "weights there are zero")  # fmt: skip
        limits = {
            s.site.name: s.site.loss.mask_above * scales[s.site.name].energy ** 0.5
            for s in self.students
            if s.site.loss.mask_above is not None
        }
        self.state.scales = scales
        within = self.held_out.scales(self.students, limits) if limits else {}
        for name, kept in within.items():
            if name in limits:
                kurtosis = scales[name].kurtosis
                self.state.scales[name] = replace(kept, limit=limits[name], kurtosis=kurtosis)

    def measure(self, students: Sequence[Student]) -> dict[str, tuple[float, float]]:
        """(error, loss) of each student over the held-out samples."""
        return self.held_out.measure(students, self.state.scales)

    def measure_bins(self) -> dict[str, dict[str, list[float]]]:
        """Errors on the held-out samples by bins of the task's time; nothing where the task has none."""
        return self.held_out.bins(self.students)

    def _fed(
        self,
        students: Sequence[Student],
        values: Sequence[Values],
        shares: Mapping[str, float],
        inputs: Mapping[str, Tensor],
    ) -> list[Values]:
        if self._own is None:
            return list(values)
        part = (self.rows, self.batch) if self.setting.ranks.size > 1 else None
        return self._own.fed(students, values, shares, inputs, part)

    def begin(self, stacks: Sequence[Sequence[str]] | None = None) -> None:
        """Measure the errors at start and decide what is stacked, unless it is given as it was decided before."""
        if not self.state.scales:
            self.measure_scales()
        self.state.start = self.measure(self.students)
        self.state.best = dict(self.state.start)
        self.keep_best([s.site.name for s in self.students])
        training = self.training(0)
        if stacks is not None:
            self.state.stacks = [list(names) for names in stacks]
        elif len(training) > 1 and self.setting.stacked != "never":
            values = self.taken(training, 0).values
            with training_only(training):
                groups = alike(training, values)
                stacks = decide(self.setting.stacked, groups, training, values)
            self.state.stacks = self.setting.ranks.share(stacks)  # `auto` hangs on times

    def exact(self, site: Site) -> bool:
        """Whether the site's error at start is 0."""
        return self.state.start[site.name][0] <= ZERO

    # -- training ---------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        return f"stage1.{self.number}"

    @property
    def steps(self) -> int:
        return max((self.plans[s.site.name].steps for s in self._trainable()), default=0)

    def _trainable(self) -> list[Student]:
        """The students that train at all, stopped since or not."""
        return [
            s
            for s in self.students
            if s.parameters and not self.exact(s.site) and self.plans[s.site.name].steps > 0
        ]

    def training(self, step: int) -> list[Student]:
        """The students that still train at `step`."""
        return [
            s
            for s in self.students
            if s.parameters
            and not self.exact(s.site)
            and step < self.plans[s.site.name].steps
            and step >= self.state.ahead.get(s.site.name, 0)
            and s.site.name not in self.state.stopped
        ]

    def make_optimiser(self) -> Optimiser:
        groups: list[Group] = []
        for student in self._trainable():
            plan = self.plans[student.site.name]
            schedule = Schedule(plan.steps, warmup=max(1, round(plan.steps * WARMUP)))
            groups.append(Group(student.site.name, student.parameters, plan.lr, schedule))
        return Optimiser(self.setting.optimiser, groups)

    def train(self, optimiser: Optimiser) -> Iterator[tuple[int, dict[str, float]]]:
        """Run the steps that are left, and yield (steps done, losses and held-out errors) after each."""
        total = self.steps
        every = max(1, -(-(self._whole or total) // _VALIDATIONS))
        stacks: list[Stack] = []
        active: list[Student] = []
        give_back_freed_memory()  # of first weights and validations, which leave other holes than a step
        with training_only(self._trainable()), keeping_freed_memory():
            for step in range(self.state.step, total):
                training = self.training(step)
                if not training and step >= max(self.state.ahead.values(), default=0):
                    return
                if not training:
                    self.state.step = step + 1
                    continue
                if [s.site.name for s in training] != [s.site.name for s in active]:
                    active, stacks = training, self._stacks(training)
                seen = self._step(step, active, stacks, optimiser)
                self.state.step = step + 1
                ending = [s for s in active if step + 1 == self.plans[s.site.name].steps]
                due = active if (step + 1) % every == 0 else ending
                if due:
                    seen |= self._validate(due)
                yield step + 1, seen

    def _stacks(self, students: Sequence[Student]) -> list[Stack]:
        regions = {s.site.name: s.region for s in students}
        kept = [[name for name in names if name in regions] for names in self.state.stacks]
        return [Stack({n: regions[n] for n in names}) for names in kept if len(names) > 1]

    def _step(
        self, step: int, students: Sequence[Student], stacks: Sequence[Stack], optimiser: Optimiser
    ) -> dict[str, float]:
        taken = self.taken(students, step)
        values = taken.values
        shares = {s.site.name: share_at(s, step, self.plans[s.site.name].steps) for s in students}
        fed = self._fed(students, values, shares, taken.inputs)
        ranks = self.setting.ranks
        key = (self.setting.seed, self.phase, step, *ranks.key())
        with random_of(*key, device=self.setting.device):
            found = losses(students, fed, self.state.scales, stacks)
        weights = [s.site.loss.weight for s in students]
        optimiser.zero()
        if ranks.size > 1:
            shares_of_mean = self._shares(students, fed)
            found = [x * share.to(x) for x, share in zip(found, shares_of_mean, strict=True)]
        torch.stack([w * x for w, x in zip(weights, found, strict=True)]).sum().backward()
        told = torch.stack(found).detach()
        ranks.add_gradients([p for s in students for p in s.parameters.values()], [told])
        norms = [gradient_norm(s.parameters.values()) for s in students]
        table: list[list[float]] = torch.stack([told, torch.stack(norms).to(told)]).tolist()
        for student, weight, loss, norm in zip(students, weights, *table, strict=True):
            name = student.site.name
            # A loss that is no number leaves no gradient that is one.
            limit = (student.site.budget.clip or CLIP) * weight
            good = clip_or_drop(list(student.parameters.values()), norm + 0 * loss, limit)
            self._in_a_row[name] = 0 if good else self._in_a_row.get(name, 0) + 1
            if not good:
                check_teacher(students, values, taken.where)
                self.state.skipped[name] = self.state.skipped.get(name, 0) + 1
            if self._in_a_row[name] >= _HOPELESS:
                fail("G545", f"the student of `{name}` gave no finite gradient in {_HOPELESS} steps",
                     site=name, found=f"loss {loss} at step {step}",
                     help="lower its `lr`, or look at its operator")  # fmt: skip
        optimiser.step(step)
        return {s.site.name: loss for s, loss in zip(students, table[0], strict=True)}

    def _shares(self, students: Sequence[Student], values: Sequence[Values]) -> list[Tensor]:
        """How much of each site's mean over the whole batch is over the entries of this process."""
        counts = torch.stack(
            [
                torch.as_tensor(
                    counted(s.weighed(v[-1], v), self.state.scales[s.site.name]),
                    dtype=torch.float64,
                    device=v[-1].device,
                )
                for s, v in zip(students, values, strict=True)
            ]
        )
        total = counts.clone()
        if any(self.state.scales[s.site.name].limit is not None for s in students):
            self.setting.ranks.add([total])
        else:  # every sample counts the same
            total = total * self.batch / len(self.rows)
        return list((counts / total.clamp(min=1)).unbind())

    def _validate(self, students: Sequence[Student]) -> dict[str, float]:
        """Measure, and keep the weights of those that have never been better."""
        found = self.measure(students)
        best = self.state.best
        better = [n for n, (_, x) in found.items() if x < best[n][1] or math.isnan(best[n][1])]
        self.state.best.update({name: found[name] for name in better})
        self.keep_best(better)
        for student in students:
            name, patience = student.site.name, student.site.budget.patience
            self.state.waited[name] = 0 if name in better else self.state.waited.get(name, 0) + 1
            if patience is not None and self.state.waited[name] >= patience:
                self.state.stopped[name] = self.state.step
        return {f"{name}.error": error for name, (error, _) in found.items()}

    def keep_best(self, names: Iterable[str]) -> None:
        chosen = set(names)
        for student in self.students:
            if student.site.name in chosen:
                for name, parameter in student.parameters.items():
                    self.best[name] = parameter.detach().clone()

    def restore_best(self) -> None:
        """Give every site the weights that had the lowest loss on the held-out samples."""
        with torch.no_grad():
            for student in self.students:
                for name, parameter in student.parameters.items():
                    parameter.copy_(self.best[name])

    def release(self) -> None:
        """Let go of what only training needed, so that it does not outlive its turn.

        References go in circles here, and Python would free them at some later time.
        """
        self.held_out.clear()
        self.best.clear()
        del self.activations
        for student in self.students:
            for parameter in student.parameters.values():
                parameter.grad = None
        gc.collect()
        give_back_freed_memory()
