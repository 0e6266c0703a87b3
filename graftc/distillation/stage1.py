"""Stage 1: every site's operator is regressed on the teacher's activations (arXiv 2506.05340, eq. 2)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.distillation.budget import samples_of, site_plans
from graftc.distillation.candidates import (
    Loaded,
    candidate_students,
    load_candidates,
    save_candidates,
)
from graftc.distillation.data import Data, Task, open_data
from graftc.distillation.generation import Generation, Setting, State
from graftc.distillation.loss import chosen
from graftc.distillation.optim import Kind, Optimiser, align
from graftc.distillation.pending import solve_pending
from graftc.distillation.reuse import Reuse, result_of, reuse_of, state_as_chosen, take
from graftc.distillation.run import Build, Progress, Run, RunResult, SiteResult, open_run
from graftc.distillation.scopes import using_threads
from graftc.distillation.stacked import Mode
from graftc.distillation.student_inputs import StudentInputs
from graftc.distillation.students import Student, students_of, trainable_names
from graftc.distillation.targets import Site, Targets, from_dict
from graftc.distillation.tensorboard import board_of

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
    checkpoint_every: int | None = None,
    sources: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: Progress | None = None,
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
    }
    defaults = {
        "seed": 0,
        "optimiser": DEFAULT_OPTIMISER,
        "stacked": "auto",
        "threads": torch.get_num_threads(),
    }
    options = (
        given if resume else {k: defaults.get(k) if v is None else v for k, v in given.items()}
    )
    targets = from_dict(build.targets)
    with open_run(build, "distill", options=options, resume=resume, sources=sources) as run:
        if (done := run.result()) is not None:
            return done
        with using_threads(run.options["threads"]), board_of(run, tensorboard):
            source = _data(run, targets, data, validation)
            setting = Setting(
                align(build.teacher()).eval().to(device),
                targets.inputs,
                source,
                task,
                run.options["seed"],
                run.options["optimiser"],
                run.options["stacked"],
                device,
                compile,
            )
            student = align(build.student()).to(device)
            loaded = load_candidates(build, targets.sites, device)
            reuse = _reuse(run, build, targets, student, bank, data, task, source.size, validation)
            made = _Stage1(
                run, targets, setting, student, loaded, checkpoint_every, progress, reuse
            )
            return made.run_all()


def _data(run: Run, targets: Targets, data: Any, validation: Any) -> Data:
    share, count = samples_of(targets.sites)
    count = run.options["samples"] or count
    seed = run.options["seed"]
    return open_data(data, seed=seed, fraction=share, samples=count, validation=validation)


def _reuse(
    run: Run,
    build: Build,
    targets: Targets,
    student: nn.Module,
    bank: str | Path | None,
    data: Any,
    task: Task,
    size: int | None,
    validation: Any,
) -> Reuse | None:
    """The bank that was given, or that the run was begun with; recorded in `run.yaml`."""
    chosen = run.facts.get("bank") if bank is None else str(Path(bank).absolute())
    if chosen is None:
        return None
    run.record(bank=chosen)
    return reuse_of(
        chosen, build, targets, run, student,
        data=data, task=task, size=size, validation=validation,
    )  # fmt: skip


class _Stage1:
    """A run of stage 1 in progress."""

    def __init__(
        self,
        run: Run,
        targets: Targets,
        setting: Setting,
        student: nn.Module,
        candidates: Sequence[Loaded],
        checkpoint_every: int | None,
        progress: Progress | None,
        reuse: Reuse | None = None,
    ) -> None:
        self.run = run
        self.reuse = reuse
        self.setting = setting
        self.student = student.train()
        self.candidates = {one.site.name: one for one in candidates}
        self.generations = targets.generations()
        self.progress = progress or silent
        self.saver = Saver(checkpoint_every)
        names = trainable_names(student, targets.sites)
        parameters = dict(student.named_parameters())
        self.tensors: dict[str, Tensor] = {n: parameters[n] for n in names}
        self.tensors.update(student.named_buffers())
        for name, one in self.candidates.items():
            state = dict(one.model.named_parameters()) | dict(one.model.named_buffers())
            self.tensors.update({f"{name}:{n}": tensor for n, tensor in state.items()})
        self.results: dict[str, SiteResult] = {}
        self.seconds = 0.0
        self.steps = 0
        self.started = time.monotonic()

    def run_all(self) -> RunResult:
        number, state, tensors = self._load()
        for at in range(number, len(self.generations)):
            self._generation(at, state if at == number else None, tensors)
        save_candidates(self.run.path, self.candidates.values())
        names = [name for group in self.generations for s in group for name in self._names(s)]
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

    def _names(self, site: Site) -> list[str]:
        """A site's own name, and those of its candidates."""
        return [site.name, *(n for n, one in self.candidates.items() if one.of.name == site.name)]

    def _students(self, sites: Sequence[Site]) -> tuple[Student, ...]:
        """What trains in a generation: the sites in the student, then their other candidates."""
        chosen = {name for site in sites for name in self._names(site)}
        others = [one for name, one in self.candidates.items() if name in chosen]
        return (*students_of(self.student, sites), *candidate_students(others))

    def _state(self, name: str) -> dict[str, Tensor]:
        return state_as_chosen(self.student, self.candidates.get(name))

    def _from_bank(self, students: Sequence[Student]) -> set[str]:
        """Take what the bank has; returns the names of those that it had."""
        found: set[str] = set()
        for name in (s.site.name for s in students):
            if self.reuse is None or (entry := self.reuse.entry(name)) is None:
                continue
            identity = self.reuse.identities[name]
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
        one = self.candidates.get(site.name)
        return found if one is None else replace(found, name=one.of.name, candidate=one.index)

    def _generation(self, number: int, state: State | None, tensors: Mapping[str, Tensor]) -> None:
        sites = self.generations[number]
        plans = site_plans(
            sites,
            self.setting.data.size,
            steps=self.run.options["steps"],
            batch=self.run.options["batch"],
            lr=self.run.options["lr"],
        )
        students = self._students(sites)
        reused = self._from_bank(students) if state is None else set[str]()
        if state is not None:  # as it was decided when the generation began
            reused = {s.site.name for s in students} - state.start.keys()
        students = tuple(s for s in students if s.site.name not in reused)
        if not students:
            return
        for name, one in self.candidates.items():
            if one.of.name in plans:
                plans[name] = plans[one.of.name]
        cuts = {name: one.of.student for name, one in self.candidates.items()}
        own = StudentInputs(self.student, cuts)
        generation = Generation(self.setting, number, students, plans, state, own=own)
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
            self._save(generation, optimiser)
        total = generation.steps
        for done, values in generation.train(optimiser):
            self._log_step(generation, done, total, values)
            if done < total and self.saver.due(done):
                self._save(generation, optimiser)
            self.progress(f"distill {number + 1}/{len(self.generations)}", done, total, values)
        if self.reuse is not None:  # should the bank have no room, nothing is trained twice
            self._save(generation, optimiser)
        generation.restore_best()
        self.steps += generation.state.step
        bins = generation.measure_bins()
        for student in generation.students:
            name = student.site.name
            result = self._result(generation, student.site, bins.get(name))
            self.results[name] = result
            if result.bins is not None:
                self.run.log(event="bins", site=name, **result.bins)
            self.run.log(event="site", **{k: v for k, v in vars(result).items() if k != "bins"})
            if self.reuse is not None:
                self.reuse.store(result, self._state(name))

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

    def _save(self, generation: Generation, optimiser: Optimiser) -> None:
        tensors = {f"model.{name}": value for name, value in self.tensors.items()}
        tensors.update({f"best.{name}": value for name, value in generation.best.items()})
        tensors.update({f"optimiser.{name}": value for name, value in optimiser.state().items()})
        facts = {
            "generation": generation.number,
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
        return facts["generation"], State.from_dict(facts["state"]), tensors


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
