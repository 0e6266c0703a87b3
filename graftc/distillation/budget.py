"""How long and how fast: a site's or stage 2's budget with the engine's defaults filled in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graftc.distillation.targets import Budget, Site, Stage2

BATCH = 64
EPOCHS = 20
FEWEST, MOST = 200, 2500
ASSUMED_SIZE = 8000
STAGE2_EPOCHS = 10
STAGE2_MOST = 50_000


@dataclass(frozen=True)
class Plan:
    """Optimiser steps, samples a step, and the peak learning rate (None: the optimiser's own)."""

    steps: int
    batch: int
    lr: float | None


def samples_of(sites: Sequence[Site]) -> tuple[float | None, int | None]:
    """The share and the count of samples that stage 1 reads: one pass feeds all sites, so the most.

    A site that sets no limit lifts it for all; one that does not train has no say.
    """
    trained = [s for s in sites if s.budget.steps != 0]
    shares = [s.budget.data for s in trained]
    counts = [s.budget.samples for s in trained]
    share = None if not shares or None in shares else max(s for s in shares if s is not None)
    count = None if not counts or None in counts else max(c for c in counts if c is not None)
    return share, count


def site_plans(
    sites: Sequence[Site],
    size: int | None,
    *,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
) -> dict[str, Plan]:
    """A plan for each site of a generation; the batch is one for all, since the teacher pass is.

    `size` is the number of distinct training samples (None: unknown, taken as 8,000). What the
    caller gives overrides the file, but for a site of 0 steps, which is not trained. Unsaid, the
    batch is 64 (or all samples), and the steps are 20 epochs, held between 200 and 2,500.

    >>> from graftc.distillation.targets import Cut
    >>> site = Site("a", Cut("", (), "a"), Cut("", (), "a"), ("a",))
    >>> site_plans([site], 1500)["a"]
    Plan(steps=469, batch=64, lr=None)
    """
    known = ASSUMED_SIZE if size is None else size
    asked = [s.budget.batch for s in sites if s.budget.batch is not None]
    shared = batch or max(asked, default=min(BATCH, known))
    return {
        s.name: Plan(
            0 if s.budget.steps == 0 else steps or _steps(s.budget, known, shared),
            shared,
            lr or s.budget.lr,
        )
        for s in sites
    }


def stage2_plan(
    stage2: Stage2,
    size: int | None,
    *,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
) -> Plan:
    """Stage 2's plan; unsaid, the batch is 64 and the steps are 10 epochs, at most 50,000."""
    known = ASSUMED_SIZE if size is None else size
    shared = batch or stage2.batch or min(BATCH, known)
    made = steps or _steps(stage2, known, shared, (STAGE2_EPOCHS, 1, STAGE2_MOST))
    return Plan(made, shared, lr or stage2.lr)


def _steps(
    budget: Budget | Stage2,
    size: int,
    batch: int,
    unsaid: tuple[float, int, int] = (EPOCHS, FEWEST, MOST),
) -> int:
    epochs, fewest, most = unsaid
    if budget.steps is not None:
        return budget.steps
    if budget.epochs is not None:
        return max(1, math.ceil(budget.epochs * size / batch))
    return min(most, max(fewest, math.ceil(epochs * size / batch)))
