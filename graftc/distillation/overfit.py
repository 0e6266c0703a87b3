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
from graftc.distillation.cuts import extract
from graftc.distillation.optim import Group, Kind, Optimiser, Schedule
from graftc.distillation.plain import OUTPUT, Distillation, SiteStudent
from graftc.distillation.targets import Site

SAMPLES, STEPS = 8, 1000
SHARE = 0.01
EXACT = 1e-6
"""Up to which error the teacher's own region counts as itself: a copy may round in another order."""


@dataclass(frozen=True)
class SiteCheck:
    """What a site could do. Errors are ‖student − teacher‖² / ‖teacher‖² over the samples themselves.

    `self_graft`: of the teacher's own region with copied weights, which is 0 if the cut is whole. `steps`:
    after how many the error was below `wanted`, or all. `reason`: why it was not; empty where it was.
    """

    name: str
    operator: str
    self_graft: float
    error_start: float
    error_end: float
    wanted: float
    steps: int
    reason: str

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
    """Train every site and candidate on one batch of `samples`, until its error is below 1 % of its start.

    Or below 1 % of the target's energy, where it starts lower than predicting zero. One teacher pass; first
    weights that wait for data are not solved. Trains `work`'s student in place, inner sites first. Raises
    GraftError: nothing to check (G580), bad data.
    """
    if not work.students:
        fail(
            "G580", "this build has no site to distil", site="targets.yaml", help="nothing to check"
        )
    torch.manual_seed(seed)
    inputs = next(work.batches(data, batch=samples, seed=seed))
    values = work.capture()(**inputs)
    found: dict[str, SiteCheck] = {}
    for names in work.generations():
        for name in names:
            found[name] = _check(work, name, values[name], steps, optimiser)
    return tuple(found[name] for name in work.students)


def _check(
    work: Distillation, name: str, values: Mapping[str, Tensor], steps: int, kind: Kind
) -> SiteCheck:
    student, target = work.students[name], values[OUTPUT]
    site = student.site
    copied = _self_graft(work, site, values)

    def verdict(start: float, end: float, at: int, reason: str) -> SiteCheck:
        wanted = SHARE * max(start, 1.0) if math.isfinite(start) else SHARE
        return SiteCheck(name, site.operator, copied, start, end, wanted, at, reason)

    if not all(bool(torch.isfinite(v).all()) for v in values.values()):
        return verdict(math.nan, math.nan, 0, "the teacher gives NaN or Inf here")
    if not float(target.square().sum()) > 0:
        return verdict(math.nan, math.nan, 0, "the teacher's output is zero on these samples")
    if not copied <= EXACT:
        why = "the teacher's own region does not give its own output: the cut lacks an input, or it is random"
        return verdict(math.nan, math.nan, 0, why)
    with torch.no_grad():
        start = _error(student(values), target)
    named = student.named
    if start <= EXACT or not named or site.budget.steps == 0:
        return verdict(start, start, 0, "")  # exact from the start, or solved and not trained
    end, at, slope, reason = _overfit(work, student, values, steps, kind, SHARE * max(start, 1.0))
    if not reason and end >= SHARE * max(start, 1.0):
        reason = _likely(student, target, slope, steps)
    return verdict(start, end, at, reason)


def _self_graft(work: Distillation, site: Site, values: Mapping[str, Tensor]) -> float:
    """The error of the teacher's region, cut out with weights of its own copy."""
    region = copy.deepcopy(extract(work.teacher, replace(site.teacher, gate=False)))
    with torch.no_grad():
        output = region(*(values[i.name] for i in site.teacher.inputs))
    if isinstance(output, (tuple, list)):
        from graftc.distillation.cuts import side_by_side

        output = side_by_side(output)
    return _error(output, values[OUTPUT])


def _overfit(
    work: Distillation,
    student: SiteStudent,
    values: Mapping[str, Tensor],
    steps: int,
    kind: Kind,
    wanted: float,
) -> tuple[float, int, float, str]:
    """(lowest error, steps, share by which the error fell in the last tenth, why it was given up)."""
    site, loss_of = student.site, work.losses[student.site.name]
    schedule = Schedule(steps, warmup=max(1, steps // 50))
    optimiser = Optimiser(kind, [Group(site.name, student.named, site.budget.lr, schedule)])
    errors: list[float] = []
    for step in range(steps):
        optimiser.zero()
        output = student(values)
        errors.append(_error(output.detach(), values[OUTPUT]))
        if errors[-1] < wanted:
            return errors[-1], step, 0.0, ""
        loss_of(output, values).backward()
        norm = max((float(p.grad.norm()) for p in student.trainable() if p.grad is not None), default=0.0)  # fmt: skip
        if step == 0 and norm == 0:
            return errors[-1], 0, 0.0, "no gradient reaches its parameters: look at its first weights and at what it detaches"  # fmt: skip
        if not math.isfinite(norm + errors[-1]):
            return min(errors), step, 0.0, f"its loss or gradient is not finite at step {step}: lower `lr`, or look at the operator"  # fmt: skip
        optimiser.step(step)
    best = min(errors)
    earlier = min(errors[: max(1, len(errors) * 9 // 10)])
    return best, steps, 1 - best / earlier, ""


def _likely(student: SiteStudent, target: Tensor, slope: float, steps: int) -> str:
    """Why a site did not get there, as far as numbers tell."""
    count = sum(p.numel() for p in student.trainable())
    said = []
    if count < target.numel():
        said.append(
            f"{count:,} parameters for {target.numel():,} numbers: too few to know them all by heart"
        )
    if slope > 0.05:
        said.append(f"its error still fell at the end: give it more than {steps} steps")
    if not said:
        said.append("its error stands still: the operator lacks an input, or a token that it would have to see; or its `lr` is wrong")  # fmt: skip
    return "; ".join(said)


def _error(output: Tensor, target: Tensor) -> float:
    if output.shape != target.shape:
        return math.inf
    wide = target.double()
    return float((output.double() - wide).square().sum() / wide.square().sum().clamp_min(1e-300))
