"""Stage 1: every site's operator is regressed on the teacher's activations (arXiv 2506.05340, eq. 2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graftc.diagnostics import Diagnostic, GraftError, Note
from graftc.distillation.candidates import save_candidates
from graftc.distillation.data import Task
from graftc.distillation.generation import Generation, State
from graftc.distillation.loss import chosen
from graftc.distillation.optim import Kind, Optimiser
from graftc.distillation.pending import solve_pending
from graftc.distillation.planner import (
    Choice,
    Costs,
    Machine,
    TrainingPlan,
    Wanted,
    choice,
    choose,
    size_text,
    smaller,
)
from graftc.distillation.replay import Window
from graftc.distillation.reuse import Reuse, result_of, reuse_of, state_as_chosen, take
from graftc.distillation.run import Build, Progress, Run, RunResult, SiteResult, open_run
from graftc.distillation.scopes import usable_device, using_threads
from graftc.distillation.stacked import Mode
from graftc.distillation.students import trainable_names
from graftc.distillation.supply import costs_of, fresh_folder, supply
from graftc.distillation.targets import Site, from_dict
from graftc.distillation.tensorboard import board_of
from graftc.distillation.work import Work, open_work

DEFAULT_OPTIMISER: Kind = "muon"
CHECKPOINT_SECONDS = 60.0


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
    usable_device(device)
    targets = from_dict(build.targets)
    with open_run(build, "distill", options=options, resume=resume, sources=sources) as run:
        if (done := run.result()) is not None:
            return done
        with using_threads(run.options["threads"]), board_of(run, tensorboard):
            settings = {**filled({}), **run.options}
            work = open_work(
                build,
                targets,
                data,
                task,
                settings,
                validation=validation,
                device=device,
                compile=compile,
            )
            kept = settings["cache"]
            wanted = Wanted(settings["reuse"], memory, disk, None if kept is None else Path(kept))
            if announce is not None and resume is None:
                _announce(run, work, wanted, announce)
            banked = _banked(run, build, work, bank, data, task, validation)
            made = _Stage1(run, work, wanted, checkpoint_every, progress, banked)
            return made.run_all()


def _announce(
    run: Run, work: Work, wanted: Wanted, announce: Callable[[TrainingPlan], None]
) -> None:
    """Tell the plan; where sizes cannot be computed and nothing depends on them, record that."""
    try:
        announce(plan_of(work, wanted))
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
    return TrainingPlan(tuple(groups), machine)


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


class _Stage1:
    """A run of stage 1 in progress."""

    def __init__(
        self,
        run: Run,
        work: Work,
        wanted: Wanted,
        checkpoint_every: int | None,
        progress: Progress | None,
        banked: Reuse | None = None,
    ) -> None:
        self.run, self.work, self.wanted = run, work, wanted
        self.setting = work.setting
        self.student = work.student
        self.banked = banked
        self.progress = progress or silent
        self.saver = Saver(checkpoint_every)
        names = trainable_names(work.student, work.targets.sites)
        parameters = dict(work.student.named_parameters())
        self.tensors: dict[str, Tensor] = {n: parameters[n] for n in names}
        self.tensors.update(work.student.named_buffers())
        for name, one in work.candidates.items():
            state = dict(one.model.named_parameters()) | dict(one.model.named_buffers())
            self.tensors.update({f"{name}:{n}": tensor for n, tensor in state.items()})
        self.results: dict[str, SiteResult] = {}
        self.seconds = 0.0
        self.steps = 0
        self.started = time.monotonic()

    def run_all(self) -> RunResult:
        number, state, tensors = self._load()
        for at in range(number, len(self.work.parts)):
            self._part(at, state if at == number else None, tensors)
        save_candidates(self.run.path, self.work.candidates.values())
        names = [n for group in self.work.generations for s in group for n in self.work.names(s)]
        self.run.log(event="finished", steps=self.steps, seconds=self._elapsed())
        return self.run.finish(
            self.student.state_dict(),
            RunResult(
                id=self.run.id,
                path=self.run.path,
                stage="distill",
                weights=self.run.path / "student.safetensors",
                steps=self.steps,
                seconds=round(self._elapsed(), 2),
                sites=tuple(self.results[name] for name in names),
                metrics=_summary([r for r in self.results.values() if r.candidate == 0]),
            ),
        )

    def _state(self, name: str) -> dict[str, Tensor]:
        return state_as_chosen(self.student, self.work.candidates.get(name))

    def _from_bank(self, names: Sequence[str]) -> set[str]:
        """Take what the bank has; returns the names of those that it had."""
        found: set[str] = set()
        for name in names:
            if self.banked is None or (entry := self.banked.entry(name)) is None:
                continue
            identity = self.banked.identities[name]
            take(entry, identity, self._state(name))
            self.results[name] = result_of(entry, identity)
            said = {k: v for k, v in vars(self.results[name]).items() if k != "bins"}
            self.run.log(event="reused", **said)
            found.add(name)
        return found

    def _result(
        self, generation: Generation, site: Site, bins: Mapping[str, list[float]] | None
    ) -> SiteResult:
        found = _result(generation, site, bins)
        one = self.work.candidates.get(site.name)
        return found if one is None else replace(found, name=one.of.name, candidate=one.index)

    def _part(self, at: int, state: State | None, tensors: Mapping[str, Tensor]) -> None:
        names = self.work.trained(at)
        if state is None:
            had = self._from_bank(names)
        else:  # as it was decided when the part began
            had = set(names) - state.start.keys()
        if had.issuperset(names):
            return
        generation = self.work.generation(at, state, had)
        costs, made = self._supply(at, generation)
        try:
            self._train(at, generation, state, tensors)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(error, costs or costs_of(self.work, generation), made) from error
        fresh_folder(self._spill)
        bins = generation.measure_bins()
        for student in generation.students:
            name = student.site.name
            result = self._result(generation, student.site, bins.get(name))
            self.results[name] = result
            if result.bins is not None:
                self.run.log(event="bins", site=name, **result.bins)
            self.run.log(event="site", **{k: v for k, v in vars(result).items() if k != "bins"})
            if self.banked is not None:
                self.banked.store(result, self._state(name))
        generation.release()

    @property
    def _spill(self) -> Path:
        return self.run.path / "buffer"

    def _supply(self, at: int, generation: Generation) -> tuple[Costs | None, Choice | None]:
        """Choose where the part's batches come from; a resumed run keeps its window."""
        wanted = self.wanted
        if wanted.reuse in (None, 1) and wanted.cache is None and wanted.memory is None:
            return None, None
        costs = costs_of(self.work, generation)
        made = choose(
            costs, wanted, Machine.read(self.setting.device, wanted.cache or self.run.path)
        )
        windows: dict[str, list[int]] = dict(self.run.facts.get("windows") or {})
        if str(at) in windows:
            made = made.keeping(Window(*windows[str(at)]), costs)
        windows[str(at)] = [made.window.batches, made.window.reuse]
        self.run.record(windows=windows)
        generation.activations = supply(generation, costs, made, wanted, self._spill)
        return costs, made

    def _train(
        self, at: int, generation: Generation, state: State | None, tensors: Mapping[str, Tensor]
    ) -> None:
        number = generation.number
        if state is None:
            for done, total in solve_pending(generation, f"init.{number}"):
                self.progress("init", done, total, {})
            generation.begin()
            self._log_start(generation)
        else:
            generation.best = under(tensors, "best.")
        optimiser = generation.make_optimiser()
        if state is not None:
            optimiser.load(under(tensors, "optimiser."))
        else:
            self._save(at, generation, optimiser)
        total = generation.steps
        for done, values in generation.train(optimiser):
            self._log_step(generation, done, total, values)
            if done < total and self.saver.due(done):
                self._save(at, generation, optimiser)
            self.progress(f"distill {at + 1}/{len(self.work.parts)}", done, total, values)
        if self.banked is not None:  # should the bank have no room, nothing is trained twice
            self._save(at, generation, optimiser)
        generation.restore_best()
        self.steps += generation.state.step

    # -- log and checkpoint -----------------------------------------------------------------

    def _log_start(self, generation: Generation) -> None:
        data = self.setting.data
        sites = [student.site for student in generation.students]
        for site in sites:
            if site.exact and not generation.exact(site):
                error = generation.state.start[site.name][0]
                self.run.log(event="warning", site=site.name, error=error,
                             message="called exact, but its error at start is not 0")  # fmt: skip
        self.run.log(
            event="start",
            generation=generation.number,
            samples=data.size,
            held_out=len(data.held_out),
            batch=generation.batch,
            optimiser=self.setting.optimiser,
            stacks=generation.state.stacks,
            sites={
                s.name: {
                    "error": generation.state.start[s.name][0],
                    "loss": generation.state.start[s.name][1],
                    "steps": 0 if generation.exact(s) else generation.plans[s.name].steps,
                    "lr": generation.plans[s.name].lr,
                    "kind": chosen(s.loss, generation.state.scales[s.name]),
                    "kurtosis": generation.state.scales[s.name].kurtosis,
                }
                for s in sites
            },
        )

    def _log_step(
        self, generation: Generation, done: int, total: int, values: Mapping[str, float]
    ) -> None:
        every = max(1, total // 100)
        if done % every == 0 or done == total or any(k.endswith(".error") for k in values):
            values = {name: float(f"{value:.6g}") for name, value in values.items()}
            self.run.log(event="step", generation=generation.number, step=done, values=values)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _save(self, part: int, generation: Generation, optimiser: Optimiser) -> None:
        tensors = {f"model.{name}": value for name, value in self.tensors.items()}
        tensors.update({f"best.{name}": value for name, value in generation.best.items()})
        tensors.update({f"optimiser.{name}": value for name, value in optimiser.state().items()})
        facts = {
            "part": part,
            "state": generation.state.to_dict(),
            "results": [vars(r) for r in self.results.values()],
            "steps": self.steps,
            "seconds": self._elapsed(),
        }
        self.run.save(tensors, facts)

    def _load(self) -> tuple[int, State | None, dict[str, Tensor]]:
        found = self.run.load()
        if found is None:
            return 0, None, {}
        tensors, facts = found
        with torch.no_grad():
            for name, value in under(tensors, "model.").items():
                self.tensors[name].copy_(value)
        results = [SiteResult(**r) for r in facts["results"]]
        self.results = {r.key: r for r in results}
        self.steps, self.seconds = facts["steps"], facts["seconds"]
        return facts["part"], State.from_dict(facts["state"]), tensors


def _out_of_memory(error: BaseException, costs: Costs, made: Choice | None) -> GraftError:
    current = made or choice(costs, "stream", Window(1, 1), {})
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    told = Diagnostic("G593", "out of memory", site=costs.sites[0],
                      wanted=f"{size_text(current.peak)}, as was predicted", found=first,
                      notes=(Note("the last checkpoint is whole"),),
                      help=f"the next smaller setting: {smaller(costs, current)}")  # fmt: skip
    return GraftError(told)


def _result(
    generation: Generation, site: Site, bins: Mapping[str, list[float]] | None
) -> SiteResult:
    state = generation.state
    trained = not generation.exact(site) and bool(site.trainable)
    steps = state.stopped.get(site.name, generation.plans[site.name].steps)
    return SiteResult(
        name=site.name,
        operator=site.operator,
        error_start=state.start[site.name][0],
        error_end=state.best[site.name][0],
        loss_start=state.start[site.name][1],
        loss_end=state.best[site.name][1],
        steps=steps if trained else 0,
        skipped_steps=state.skipped.get(site.name, 0),
        bins=bins,
    )


def _summary(sites: Sequence[SiteResult]) -> dict[str, float]:
    """The mean error over the sites at start and end."""
    count = max(1, len(sites))
    return {
        "error_start": sum(s.error_start for s in sites) / count,
        "error_end": sum(s.error_end for s in sites) / count,
    }


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def silent(phase: str, done: int, total: int, values: Mapping[str, float]) -> None:
    pass


class Saver:
    """Says when a checkpoint is due: every so many steps, or every minute."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        if time.monotonic() - self._last < CHECKPOINT_SECONDS:
            return False
        self._last = time.monotonic()
        return True
