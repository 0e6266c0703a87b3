"""How the processes of a job share stage 1, and what says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from graftc.diagnostics import fail, nearest
from graftc.distillation.ranks import Ranks
from graftc.distillation.run import Run
from graftc.distillation.work import Work

Parallel = Literal["data"]


@dataclass(frozen=True)
class Sharing:
    """The way that was chosen, and a line that says it and why."""

    mode: Parallel
    text: str


def sharing(work: Work, ranks: Ranks, asked: Parallel | None, run: Run) -> Sharing:
    """How the processes share the work: as the run began, as it was asked for, or by the rule.

    The rule: `data`, where every process gets a row of each batch. Raises GraftError (G578).
    """
    if asked is not None and asked not in get_args(Parallel):
        near = nearest(asked, get_args(Parallel))
        fail("G578", f"there is no way `{asked}` to share stage 1", site="--parallel",
             wanted=", ".join(get_args(Parallel)), found=asked,
             help=f"write `{near}`" if near else None)  # fmt: skip
    smallest = min((work.generation(part).batch for part in range(len(work.parts))), default=0)
    if ranks.size > smallest:
        fail("G578", f"a batch of {smallest} cannot be shared among {ranks.size} ranks", site="--batch",
             wanted=f"at least {ranks.size} samples", found=str(smallest),
             help="give a larger --batch, or start fewer ranks")  # fmt: skip
    if ranks.size == 1:
        return Sharing("data", "")
    run.record(ranks={"size": ranks.size, "parallel": "data"})
    return Sharing("data", f"{ranks.size} ranks, data parallel: each has its rows of every batch")
