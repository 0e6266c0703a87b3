"""Stage 1: every site's operator is regressed on the teacher's activations (arXiv 2506.05340, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from graftc.diagnostics import GraftError
from graftc.distillation.advice import loading_advice
from graftc.distillation.data import Task
from graftc.distillation.optim import Kind
from graftc.distillation.out_of_memory import memory_told
from graftc.distillation.planner import Choice, Costs, Machine, TrainingPlan, Wanted, choose
from graftc.distillation.ranks import device_of, in_order, joined
from graftc.distillation.reuse import Reuse, reuse_of
from graftc.distillation.run import Branch, Build, Follower, Progress, Run, RunResult, open_run
from graftc.distillation.scopes import usable_device, using_threads
from graftc.distillation.sharing import check_pieces, sharing
from graftc.distillation.stacked import Mode
from graftc.distillation.stage1_run import Stage1Run
from graftc.distillation.stage1_sites import Stage1Sites
from graftc.distillation.supply import costs_of
from graftc.distillation.targets_file import from_dict
from graftc.distillation.tensorboard import board_of
from graftc.distillation.work import Work, open_work

DEFAULT_OPTIMISER: Kind = "muon"


def distill(
    build: Build,
    data: Any,
    task: Task,
    *,
    seed: int | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    samples: int | None = None,
    optimiser: Kind | None = None,
    stacked: Mode | None = None,
    validation: Any = None,
    resume: str | None = None,
    bank: str | Path | None = None,
    device: str = "cpu",
    compile: bool = False,
    threads: int | None = None,
    reuse: int | Literal["auto"] | None = None,
    memory: int | None = None,
    disk: int | None = None,
    cache: str | Path | None = None,
    site_by_site: bool | None = None,
    checkpoint_every: int | None = None,
    parallel: str | None = None,
    shard_teacher: bool = False,
    sources: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: Progress | None = None,
    announce: Callable[[TrainingPlan], None] | None = None,
) -> RunResult:
    """Train every site of a build on the teacher's activations; the run is `DIR/runs/ID`.

    Sites are trained in topological generations of `after`; within one, a single teacher pass a
    step feeds all, candidates of `one of` too, and ends after the last that still trains. `steps`, `batch`, `lr` and `samples`
    override the file for all sites; unsaid, see `graftc.distillation.budget`. `seed` (0) orders the data
    and draws the noise. `validation` is a DATA to measure errors on; unsaid, a tenth of DATA.
    `stacked` is "auto", "never" or "always". A checkpoint is written every `checkpoint_every` steps
    (unsaid: every minute). `resume` continues a run that was killed, with its own options, and
    ends with the same bits as an uninterrupted run on the same CPU and threads. `bank` is a directory
    of trained sites: what it has is not trained again, what is trained is added (`docs/targets.md`, "The
    bank"); a resumed run keeps its own. `sources` is plain
    data on where DATA and the task came from, kept in `run.yaml` and not compared on `resume`.
    With `tensorboard` the log is written as TensorBoard events too.

    Each teacher batch is used for `reuse` steps ("auto": as many as keep the teacher's work below the
    students'; unsaid, one), kept within `memory` bytes that the run may take in all, then within `disk`
    bytes; or it is kept for good in the folder `cache`, where a later run of the same teacher, data, task
    and seed finds it. `site_by_site` trains one site after the other in the memory of one.
    `announce` gets the plan with its predictions before anything starts (`plan_distill` stops there).

    Under `torchrun` the processes share the work (`docs/scale.md`): by `parallel="data"` each takes its rows
    of every batch, by "sites" its own sites. They return the same result; `run.yaml` says what was chosen. With
    `shard_teacher` each has a piece of the teacher (FSDP2), and they run it together.

    Raises GraftError for bad data or a teacher that is not finite; the last checkpoint stays.
    """
    given = {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "samples": samples,
        "optimiser": optimiser,
        "stacked": stacked,
        "threads": threads,
        "reuse": reuse,
        "cache": None if cache is None else str(Path(cache).absolute()),
        "site_by_site": site_by_site,
    }
    options = given if resume else filled(given)
    usable_device(device_of(device))
    targets = from_dict(build.targets)
    with (
        joined(device) as ranks,
        open_run(
            build, "distill", options=options, resume=resume, sources=sources, ranks=ranks
        ) as run,
    ):
        if (done := run.result()) is not None:
            return done
        board = board_of(run, tensorboard and ranks.first)
        with using_threads(run.options["threads"]), board:
            settings = {**filled({}), **run.options}
            pieces = shard_teacher and ranks.size > 1
            if pieces:
                given = {"compile": compile, "memory": memory, "parallel": parallel}
                check_pieces(targets, {**settings, **given})
            place = ranks.device if ranks.size > 1 else device
            with memory_told("--device", lambda: loading_advice(place)):
                work = open_work(
                    build,
                    targets,
                    data,
                    task,
                    settings,
                    validation=validation,
                    device=place,
                    compile=compile,
                    ranks=ranks,
                    pieces=pieces,
                )
            shared = sharing(work, ranks, parallel, run)
            kept = settings["cache"]
            wanted = Wanted(settings["reuse"], memory, disk, None if kept is None else Path(kept))
            if announce is not None and resume is None and ranks.first and not pieces:
                _announce(run, work, wanted, announce, shared.text)
            banked = in_order(
                ranks, lambda: _banked(run, build, work, bank, data, task, validation)
            )
            kind = Stage1Sites if shared.mode == "sites" else Stage1Run
            own = Branch(run.path, run.facts, ranks.rank) if isinstance(run, Follower) else run
            entry = own if shared.mode == "sites" else run
            made = kind(entry, work, wanted, checkpoint_every, progress, banked, ranks)
            return made.run_all()


def _announce(
    run: Run,
    work: Work,
    wanted: Wanted,
    announce: Callable[[TrainingPlan], None],
    ranks: str,
) -> None:
    """Tell the plan; where sizes cannot be computed and nothing depends on them, record that."""
    try:
        announce(replace(plan_of(work, wanted), ranks=ranks))
    except GraftError as error:
        if error.diagnostics[0].code != "G597" or wanted != Wanted():
            raise
        run.record(plan=f"none: {error.diagnostics[0].message}")


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the defaults of those that are unsaid."""
    names = ("steps", "batch", "lr", "samples", "reuse", "cache")
    defaults = {
        **dict.fromkeys(names),
        "seed": 0,
        "optimiser": DEFAULT_OPTIMISER,
        "stacked": "auto",
        "threads": torch.get_num_threads(),
        "site_by_site": False,
    }
    return defaults | {k: v for k, v in given.items() if v is not None}


def plan_distill(
    build: Build,
    data: Any,
    task: Task,
    *,
    reuse: int | Literal["auto"] | None = None,
    memory: int | None = None,
    disk: int | None = None,
    cache: str | Path | None = None,
    validation: Any = None,
    device: str = "cpu",
    **options: Any,
) -> TrainingPlan:
    """What `distill` with these options would take; one step of each part is run, to time it.

    Nothing is written. Raises GraftError as `distill`, and where the settings do not fit (G592).
    """
    settings = filled(options)
    usable_device(device)
    with using_threads(settings["threads"]):
        with memory_told("--device", lambda: loading_advice(device)):
            work = open_work(
                build,
                from_dict(build.targets),
                data,
                task,
                settings,
                validation=validation,
                device=device,
            )
        return plan_of(work, Wanted(reuse, memory, disk, None if cache is None else Path(cache)))


def plan_of(work: Work, wanted: Wanted) -> TrainingPlan:
    """The plan of all parts, with measured times."""
    machine = Machine.read(work.setting.device, wanted.cache or Path.cwd())
    groups: list[tuple[Costs, Choice]] = []
    for part in range(len(work.parts)):
        generation = work.generation(part)
        costs = costs_of(work, generation, measured=True)
        generation.release()
        groups.append((costs, choose(costs, wanted, machine)))
    return TrainingPlan(tuple(groups), machine, warnings=work.warnings())


def _banked(
    run: Run,
    build: Build,
    work: Work,
    bank: str | Path | None,
    data: Any,
    task: Task,
    validation: Any,
) -> Reuse | None:
    """The bank that was given, or that the run was begun with; recorded in `run.yaml`."""
    chosen = run.facts.get("bank") if bank is None else str(Path(bank).absolute())
    if chosen is None:
        return None
    run.record(bank=chosen)
    size = work.setting.data.size
    return reuse_of(
        chosen, build, work.targets, run, work.student,
        data=data, task=task, size=size, validation=validation,
    )  # fmt: skip
