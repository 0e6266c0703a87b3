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
FREE = 2
"""Parameters wanted for each number that is learned: not all are free (a product of two scales has one degree of
freedom). The digits example's Hyena-X, with 2.5 for each, is at 1 % after 730 steps, with 1.2 after 2,900, and with 0.6
at 2.4 % after 4,000, from random weights and from least squares alike (L-BFGS, 600 evaluations: 5.5 %)."""
WANTED = 0.01
EXACT = 1e-6
"""Up to which squared error the teacher's own region counts as itself: a copy may round in another order."""

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class SiteCheck:
    """What a site could do. Losses are the site's own, divided by what a prediction of zero costs.

    `self_graft`: of the teacher's own region with copied weights, which is 0 if the cut is whole. `steps`: after
    how many the loss was below `wanted`, or all. `error_end`: ‖student − teacher‖² / ‖teacher‖² there. `samples`: on
    how many; fewer than 8 where the site has no two parameters for each of their numbers, and of a single sample `rows`
    alone where it has not that many for one (0: all; `note` says so, and where DATA gave fewer). `reason`: why the site did not get there; empty
    where it did.
    """

    name: str
    operator: str
    self_graft: float
    loss_start: float
    loss_end: float
    error_end: float
    steps: int
    samples: int
    rows: int = 0
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
    samples: int | None = None,
    steps: int = STEPS,
    seed: int = 0,
    optimiser: Kind = "muon",
) -> tuple[SiteCheck, ...]:
    """Train every site and candidate on one batch of samples, until its loss is below 1 % of what zero costs.

    On 8 samples, or on as many as the site has parameters for, two a number; on `samples` exactly, where they are
    given. One teacher pass; first weights that wait for data are not solved. Trains `work`'s student in place, inner
    sites first. Raises GraftError: nothing to check (G580), bad data.
    """
    if not work.students:
        fail(
            "G580", "this build has no site to distil", site="targets.yaml", help="nothing to check"
        )
    torch.manual_seed(seed)
    asked = samples or SAMPLES
    inputs, given = _different(next(work.batches(data, batch=asked, seed=seed)), asked)
    # The teacher's own region may take more than the student's call does: a mask.
    cuts = {n: with_all_inputs(work.teacher, s.site.teacher) for n, s in work.students.items()}
    values = Capture(work.teacher, cuts)(**inputs)
    found: dict[str, SiteCheck] = {}
    for names in work.generations():
        for name in names:
            forced = samples is not None
            check = _check(work, name, cuts[name], values[name], steps, optimiser, forced)
            notes = [given, check.note]
            found[name] = replace(check, note="; ".join(note for note in notes if note))
    return tuple(found[name] for name in work.students)


def _different(inputs: Values, asked: int) -> tuple[Values, str]:
    """The samples of a batch without repetitions, and what is to be said of it: a short DATA begins again, and what
    differs by its noise alone is another sample."""
    rows = {n: v for n, v in inputs.items() if v.ndim and len(v) == asked}
    first: dict[bytes, int] = {}
    for i in range(asked):
        row = [v[i].detach().cpu().contiguous().reshape(-1) for v in rows.values()]
        first.setdefault(b"".join(v.view(torch.uint8).numpy().tobytes() for v in row), i)
    if not rows or len(first) == asked:
        return inputs, ""
    kept = list(first.values())
    said = f"DATA gives {len(kept)} different sample{'s' if len(kept) > 1 else ''} where {asked} are taken"
    return {n: v[kept] if n in rows else v for n, v in inputs.items()}, said


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


@dataclass(frozen=True)
class _Part:
    """What of a batch is learned: its first `samples`, and of a single one `rows`, evenly spaced (0: all).

    A row is all that lies along the target's last axis: a token's channels.
    """

    samples: int
    rows: int = 0
    note: str = ""

    def of(self, values: Values) -> Values:
        count = len(values[OUTPUT])
        return {n: v[: self.samples] if len(v) == count else v for n, v in values.items()}

    def seen(self, target: Tensor) -> Tensor:
        """Which numbers of the target count, [B, …, 1]."""
        lead = target.shape[:-1]
        each = math.prod(lead)
        seen = torch.ones(each, dtype=torch.bool, device=target.device)
        if self.rows:
            seen[:] = False
            seen[torch.arange(self.rows, device=target.device) * each // self.rows] = True
        return seen.view(*lead, 1)


def _fitting(parameters: int, target: Tensor) -> _Part:
    """As much of the batch as `parameters` can be expected to know by heart."""
    count, width = len(target), target.shape[-1]
    each = target.numel() // count
    samples = min(count, parameters // (FREE * each))
    if samples == count:
        return _Part(count)
    all_of_them = f"{count} samples have" if count > 1 else "one sample has"
    many = f"{parameters:,} parameters, and {all_of_them} {target.numel():,} numbers"
    if samples:
        return _Part(samples, note=f"checked on {samples} of them: {many}")
    # One parameter a number at least: a scale of its own for each channel knows a token.
    rows = min(each // width, max(parameters // (FREE * width), int(parameters >= width)))
    if not rows:
        return _Part(1)
    return _Part(1, rows, f"checked on {rows} of {each // width} rows of one sample: {many}")


def _check(
    work: Distillation,
    name: str,
    cut: Cut,
    values: Values,
    steps: int,
    kind: Kind,
    forced: bool,
) -> SiteCheck:
    student, target, loss = work.students[name], values[OUTPUT], work.losses[name]
    site, count = student.site, len(target)
    parameters = sum(p.numel() for p in student.trainable())

    def verdict(
        fit: _Fit, *, copied: float = math.nan, start: float = math.nan, reason: str = "", part: _Part = _Part(count)
    ) -> SiteCheck:  # fmt: skip
        return SiteCheck(
            name, site.operator, copied, start, fit.loss, fit.error, fit.steps, part.samples, part.rows,
            note=part.note, reason=reason,
        )  # fmt: skip

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
    part = _Part(count) if forced or not parameters else _fitting(parameters, target)
    fit = _overfit(loss, student, part, values, steps, kind)
    numbers = int(part.seen(part.of(values)[OUTPUT]).sum()) * target.shape[-1]
    few = f"{parameters:,} parameters for {numbers:,} numbers" if parameters < numbers else ""
    return verdict(fit, copied=copied, start=start, reason=_likely(fit, steps, few), part=part)


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


def _overfit(
    loss: SiteLoss, student: SiteStudent, part: _Part, values: Values, steps: int, kind: Kind
) -> _Fit:
    schedule = Schedule(steps, warmup=max(1, steps // 50))
    site, values = student.site, part.of(values)
    optimiser = Optimiser(kind, [Group(site.name, student.named, site.budget.lr, schedule)])
    target = values[OUTPUT]
    counts = part.seen(target)
    # What does not count is given as it should be: it costs nothing, and has no gradient.
    unit = float(loss(torch.where(counts, 0.0, target), values))
    seen: list[float] = []
    best = (math.inf, math.inf)
    for step in range(steps):
        optimiser.zero()
        output = torch.where(counts, student(values), target)
        value = loss(output, values)
        seen.append(float(value.detach()) / unit)
        if seen[-1] < best[0]:
            best = seen[-1], _error(output.detach(), target, counts)
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


def _likely(fit: _Fit, steps: int, few: str) -> str:
    """Why a site did not get there, as far as numbers tell; empty where it did. `few`: what it has too few parameters for."""
    if fit.there or fit.broke:
        return fit.broke
    said = [f"too few to know them all by heart: {few}"] if few else []
    if fit.slope > 0.05:
        said.append(f"its loss still fell at the end: give it more than {steps} steps")
    if not said:
        said.append("its loss stands still: the operator lacks an input, or a token that it would have to see; or its `lr` is wrong")  # fmt: skip
    return "; ".join(said)


def _share(loss: SiteLoss, output: Tensor, values: Values) -> float:
    """The site's loss as a share of what a prediction of zero costs."""
    with torch.no_grad():
        return float(loss(output, values)) / float(loss(torch.zeros_like(output), values))


def _error(output: Tensor, target: Tensor, counts: Tensor | None = None) -> float:
    if output.shape != target.shape:
        return math.inf
    wide = target.double()
    energy = (wide if counts is None else wide * counts).square().sum()
    return float((output.detach().double() - wide).square().sum() / energy.clamp_min(1e-300))
