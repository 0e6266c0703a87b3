"""Before a long run: can each site learn at all? A few samples by heart, and the teacher grafted onto itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftc.diagnostics import fail
from graftc.distillation.cuts import extract, side_by_side, with_all_inputs
from graftc.distillation.loss import same_for_all
from graftc.distillation.optim import Group, Kind, Optimiser, Schedule
from graftc.distillation.plain import OUTPUT, Capture, Distillation, SiteLoss, SiteStudent
from graftc.distillation.targets import Cut

SAMPLES, STEPS = 8, 1000
WANTED = 0.01
EXACT = 1e-6
"""Up to which squared error the teacher's own region counts as itself: a copy may round in another order."""

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class SiteCheck:
    """What a site could do. Losses are the site's own, divided by what a prediction of zero costs.

    `self_graft`: of the teacher's own region with copied weights, which is 0 if the cut is whole. `steps`: after
    how many the loss was below `wanted`, or all. `error_end`: ‖student − teacher‖² / ‖teacher‖² there. `samples`: on
    how many; fewer than were asked for where the site has fewer parameters than those have numbers (`note` says so).
    `reason`: why the site did not get there; empty where it did.
    """

    name: str
    operator: str
    self_graft: float
    loss_start: float
    loss_end: float
    error_end: float
    steps: int
    samples: int
    wanted: float = WANTED
    note: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


def check_distill(
    work: Distillation,
    data: Any,
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 0,
    optimiser: Kind = "muon",
) -> tuple[SiteCheck, ...]:
    """Train every site and candidate on one batch of `samples`, until its loss is below 1 % of what zero costs.

    A site that does not get there and that has fewer parameters than the batch has numbers begins again on as many
    samples as it has parameters for. One teacher pass; first weights that wait for data are not solved. Trains
    `work`'s student in place, inner sites first. Raises GraftError: nothing to check (G580), bad data.
    """
    if not work.students:
        fail(
            "G580", "this build has no site to distil", site="targets.yaml", help="nothing to check"
        )
    torch.manual_seed(seed)
    inputs = next(work.batches(data, batch=samples, seed=seed))
    # The teacher's own region may take more than the student's call does: a mask.
    cuts = {n: with_all_inputs(work.teacher, s.site.teacher) for n, s in work.students.items()}
    values = Capture(work.teacher, cuts)(**inputs)
    found: dict[str, SiteCheck] = {}
    for names in work.generations():
        for name in names:
            found[name] = _check(work, name, cuts[name], values[name], steps, optimiser)
    return tuple(found[name] for name in work.students)


@dataclass(frozen=True)
class _Fit:
    """How far a site came: lowest loss and the squared error there, steps, the share by which the loss fell in the
    last tenth, and why it was given up."""

    loss: float
    error: float
    steps: int
    slope: float = 0.0
    broke: str = ""

    @property
    def there(self) -> bool:
        return not self.broke and self.loss < WANTED


def _check(
    work: Distillation, name: str, cut: Cut, values: Values, steps: int, kind: Kind
) -> SiteCheck:
    student, target, loss = work.students[name], values[OUTPUT], work.losses[name]
    site, count = student.site, len(target)

    def verdict(fit: _Fit, *, copied: float = math.nan, start: float = math.nan, reason: str = "",
                on: int = count, note: str = "") -> SiteCheck:  # fmt: skip
        return SiteCheck(name, site.operator, copied, start, fit.loss, fit.error, fit.steps, on, note=note, reason=reason)  # fmt: skip

    nothing = _Fit(math.nan, math.nan, 0)
    if reason := _unusable(values):
        return verdict(nothing, reason=reason)
    region = _copied_region(work, cut, values)
    if not _error(region, target) <= EXACT:
        why = "the teacher's own region does not give its own output: the cut lacks an input, or it is random"
        return verdict(nothing, copied=_error(region, target), reason=why)
    copied = _share(loss, region, values)
    with torch.no_grad():
        output = student(values)
    if output.shape != target.shape:
        shapes = f"{list(output.shape)}, the teacher {list(target.shape)}"
        return verdict(nothing, copied=copied, reason=f"its output is {shapes}")
    start = _share(loss, output, values)
    if _error(output, target) <= EXACT or not student.named or site.budget.steps == 0:
        # exact from the start, or solved and not trained
        return verdict(_Fit(start, _error(output, target), 0), copied=copied, start=start)
    first = {n: p.detach().clone() for n, p in student.named.items()}
    fit = _overfit(loss, student, values, steps, kind)
    if fit.there or fit.broke:
        return verdict(fit, copied=copied, start=start, reason=fit.broke)
    parameters, each = sum(p.numel() for p in student.trainable()), target.numel() // count
    # Two parameters a number: not all of them are free (a product of two scales has one degree of freedom).
    fewer = min(count - 1, max(parameters // (2 * each), int(parameters >= each)))
    many = f"{parameters:,} parameters for {count * each:,} numbers"
    if parameters < count * each and fewer:
        with torch.no_grad():
            for n, p in student.named.items():
                p.copy_(first[n])
        part = {n: v[:fewer] if len(v) == count else v for n, v in values.items()}
        again = _overfit(loss, student, part, steps, kind)
        if again.there:
            note = (
                f"{many}, of which it came to {fit.loss:.2g}; checked on {fewer} of {count} samples"
            )
            return verdict(again, copied=copied, start=start, on=fewer, note=note)
        many += f", and on {fewer} of {count} samples it came to {again.loss:.2g} only"
    reason = _likely(fit, steps, many if parameters < count * each else "")
    return verdict(fit, copied=copied, start=start, reason=reason)


def _unusable(values: Values) -> str:
    """Why nothing can be learned from these values; empty where something can."""
    target = values[OUTPUT]
    if not all(bool(torch.isfinite(v).all()) for v in values.values()):
        return "the teacher gives NaN or Inf here"
    if not float(target.square().sum()) > 0:
        return "the teacher's output is zero on these samples"
    if len(target) > 1 and same_for_all(target):
        return "the teacher's output is the same for each of these samples: a constant would do"
    return ""


def _copied_region(work: Distillation, cut: Cut, values: Values) -> Tensor:
    """What the teacher's region gives, cut out with weights of its own copy."""
    region = copy.deepcopy(extract(work.teacher, replace(cut, gate=False)))
    with torch.no_grad():
        return side_by_side(region(*(values[i.name] for i in cut.inputs)))


def _overfit(loss: SiteLoss, student: SiteStudent, values: Values, steps: int, kind: Kind) -> _Fit:
    schedule = Schedule(steps, warmup=max(1, steps // 50))
    site = student.site
    optimiser = Optimiser(kind, [Group(site.name, student.named, site.budget.lr, schedule)])
    unit = float(loss(torch.zeros_like(values[OUTPUT]), values))
    seen: list[float] = []
    best = (math.inf, math.inf)
    for step in range(steps):
        optimiser.zero()
        output = student(values)
        value = loss(output, values)
        seen.append(float(value.detach()) / unit)
        if seen[-1] < best[0]:
            best = seen[-1], _error(output.detach(), values[OUTPUT])
        if seen[-1] < WANTED:
            return _Fit(*best, step)
        value.backward()
        norm = max((float(p.grad.norm()) for p in student.trainable() if p.grad is not None), default=0.0)  # fmt: skip
        if step == 0 and norm == 0:
            return _Fit(*best, 0, broke="no gradient reaches its parameters: look at its first weights and at what it detaches")  # fmt: skip
        if not math.isfinite(norm + seen[-1]):
            return _Fit(*best, step, broke=f"its loss or gradient is not finite at step {step}: lower `lr`, or look at the operator")  # fmt: skip
        optimiser.step(step)
    earlier = min(seen[: max(1, len(seen) * 9 // 10)])
    return _Fit(*best, steps, 1 - best[0] / earlier)


def _likely(fit: _Fit, steps: int, many: str) -> str:
    """Why a site did not get there, as far as numbers tell; `many`: what it has too few parameters for."""
    said = [f"too few to know them all by heart: {many}"] if many else []
    if fit.slope > 0.05:
        said.append(f"its loss still fell at the end: give it more than {steps} steps")
    if not said:
        said.append("its loss stands still: the operator lacks an input, or a token that it would have to see; or its `lr` is wrong")  # fmt: skip
    return "; ".join(said)


def _share(loss: SiteLoss, output: Tensor, values: Values) -> float:
    """The site's loss as a share of what a prediction of zero costs."""
    with torch.no_grad():
        return float(loss(output, values)) / float(loss(torch.zeros_like(output), values))


def _error(output: Tensor, target: Tensor) -> float:
    if output.shape != target.shape:
        return math.inf
    wide = target.double()
    return float(
        (output.detach().double() - wide).square().sum() / wide.square().sum().clamp_min(1e-300)
    )
