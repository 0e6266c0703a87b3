"""How the processes of a job share a stage, and what says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from graftc.diagnostics import fail, nearest
from graftc.distillation.budget import site_plans
from graftc.distillation.ranks import ALONE, Ranks
from graftc.distillation.run import Run
from graftc.distillation.targets import Targets
from graftc.distillation.work import Work

Parallel = Literal["data", "sites"]
Parallel2 = Literal["data", "pieces"]


@dataclass(frozen=True)
class Sharing:
    """The way that was chosen, and a line that says it and why; `ranks` share each batch."""

    mode: Parallel
    ranks: Ranks
    text: str


def sharing(work: Work, team: Ranks, asked: str | None, run: Run) -> Sharing:
    """How the processes share the work: as the run began, as it was asked for, or by the rule.

    The rule: `data`, where every process gets a row of each batch, else `sites`. Raises GraftError (G578).
    """
    _known(asked, get_args(Parallel), "stage 1")
    begun: dict[str, Any] = run.facts.get("ranks") or {}
    before = begun.get("parallel")
    if before and asked and before != asked:
        fail("G578", f"the run `{run.id}` shares its work by `{before}`", site="--parallel",
             wanted=before, found=asked, help="leave --parallel out, or start a new run")  # fmt: skip
    batch = _batch(work)
    apart = _hindrance(work)
    mode = before or asked or ("data" if team.size <= batch or apart else "sites")
    if mode == "sites" and apart:
        fail("G578", f"the sites cannot be divided among ranks: {apart}", site="--parallel",
             wanted="data", found="sites", help="--parallel data")  # fmt: skip
    if mode == "data":
        team.enough(batch)
    if mode == "sites" and team.size > 1 and team.store is None:
        fail("G578", "sites are divided among ranks only where graftc makes the process group",
             site="--parallel", help="call it before torch.distributed.init_process_group, or use data")  # fmt: skip
    if team.size > 1 or begun:
        run.record(ranks={"size": team.size, "parallel": mode})
    if mode == "sites":
        work.setting = replace(work.setting, ranks=ALONE)
        text = f"{team.size} ranks, each with its own sites; the figures are of all sites in one"
        return Sharing("sites", ALONE, text if team.size > 1 else "")
    text = f"{team.size} ranks, each with its rows of every batch; the figures are of one rank"
    return Sharing("data", team, text if team.size > 1 else "")


def check_pieces(targets: Targets, wanted: Mapping[str, Any]) -> None:
    """What a teacher in pieces cannot do. `wanted`: options of `distill`. Raises GraftError (G831)."""
    reads = [s.name for s in targets.sites if any(p.policy == "keep_top" for p in s.pending)]
    names = {"compile": "--compile", "reuse": "--reuse", "cache": "--cache", "memory": "--memory"}
    for name, flag in names.items():
        if wanted.get(name):
            fail("G831", f"`{flag}` needs the teacher whole", site="--shard-teacher", found=flag,
                 help=f"leave out {flag}, or --shard-teacher")  # fmt: skip
    if wanted.get("parallel") == "sites":
        fail("G831", "processes that train sites apart do not run the teacher together",
             site="--shard-teacher", wanted="--parallel data", found="--parallel sites")  # fmt: skip
    if reads:
        fail("G831", f"the first weights of `{reads[0]}` are read from the teacher's", site="--shard-teacher",
             found="keep_top", help="give --data to `compile`, which solves them there")  # fmt: skip


def sharing2(team: Ranks, asked: str | None, run: Run) -> Parallel2:
    """How the processes share stage 2: each has rows of every batch, and the model whole or in pieces.

    A resumed run goes on as it began unless it is asked otherwise. Raises GraftError (G578).
    """
    _known(asked, get_args(Parallel2), "stage 2")
    begun: dict[str, Any] = run.facts.get("ranks") or {}
    mode = asked or begun.get("parallel") or "data"
    if team.size > 1 or begun:
        run.record(ranks={"size": team.size, "parallel": mode})
    return "pieces" if mode == "pieces" and team.size > 1 else "data"


def _known(asked: str | None, ways: Sequence[str], stage: str) -> None:
    if asked is not None and asked not in ways:
        near = nearest(asked, ways)
        fail("G578", f"there is no way `{asked}` to share {stage}", site="--parallel",
             wanted=", ".join(ways), found=asked, help=f"write `{near}`" if near else None)  # fmt: skip


def _batch(work: Work) -> int:
    """The smallest batch of a part."""
    given = {name: work.options[name] for name in ("steps", "batch", "lr")}
    size = work.setting.data.size
    plans = [site_plans(sites, size, **given) for sites in work.generations]
    return min((plan.batch for group in plans for plan in group.values()), default=1)


def _hindrance(work: Work) -> str | None:
    """Why sites cannot be trained apart, if so."""
    if work.options["site_by_site"]:
        return "--site-by-site trains one at a time"
    fed = [s.name for s in work.targets.sites if max(s.student_inputs) > 0]
    if fed:
        return f"`{fed[0]}` is fed what the student's sites before it give"
    return None
