"""A run of stage 1 in progress: its parts one after the other, its log and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.distillation.advice import stage1_advice
from graftc.distillation.candidates import save_candidates
from graftc.distillation.few import lines
from graftc.distillation.generation import Generation, State
from graftc.distillation.loss import chosen
from graftc.distillation.optim import Optimiser
from graftc.distillation.out_of_memory import memory_told
from graftc.distillation.pending import solve_pending
from graftc.distillation.planner import Choice, Costs, Machine, Wanted, choose
from graftc.distillation.ranks import ALONE, Ranks
from graftc.distillation.replay import Window
from graftc.distillation.reuse import Reuse, result_of, state_as_chosen, take
from graftc.distillation.run import Progress, Run, RunResult, SiteResult
from graftc.distillation.saving import Saver, silent, under
from graftc.distillation.students import trainable_names
from graftc.distillation.supply import costs_of, fresh_folder, supply
from graftc.distillation.targets import Site
from graftc.distillation.work import Work


class Stage1Run:
    """A run of stage 1 in progress. `team`: all processes of the job, of which rank 0 writes."""

    keeps_end = False
    """Whether a checkpoint is written after a part's last step too."""

    def __init__(
        self,
        run: Run,
        work: Work,
        wanted: Wanted,
        checkpoint_every: int | None,
        progress: Progress | None,
        banked: Reuse | None = None,
        team: Ranks = ALONE,
    ) -> None:
        self.run, self.work, self.wanted = run, work, wanted
        self.setting = work.setting
        self.team = team
        self.student = work.student
        self.banked = banked
        self.progress = progress if progress and self.team.first else silent
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
        if self.team.first:
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
                warnings=lines(self.work.warnings()),
            ),
        )

    def _state(self, name: str) -> dict[str, Tensor]:
        return state_as_chosen(self.student, self.work.candidates.get(name))

    def _from_bank(self, names: Sequence[str]) -> set[str]:
        """Take what the bank has; returns the names of those that it had."""
        banked = self.banked
        if banked is None:
            return set()
        found = self.team.share([n for n in names if banked.entry(n) is not None])
        for name in found:
            identity, entry = banked.identities[name], banked.entry(name)
            assert entry is not None
            take(entry, identity, self._state(name))
            self.results[name] = result_of(entry, identity)
            said = {k: v for k, v in vars(self.results[name]).items() if k != "bins"}
            self.run.log(event="reused", **said)
        return set(found)

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
        self._train(at, generation, state, tensors, *self._supply(at, generation))
        self.steps += generation.state.step
        for name, result in self._found(generation).items():
            self._tell(name, result)
        generation.release()

    def _found(self, generation: Generation) -> dict[str, SiteResult]:
        bins = generation.measure_bins()
        sites = [student.site for student in generation.students]
        return {s.name: self._result(generation, s, bins.get(s.name)) for s in sites}

    def _tell(self, name: str, result: SiteResult) -> None:
        self.results[name] = result
        if result.bins is not None:
            self.run.log(event="bins", site=name, **result.bins)
        self.run.log(event="site", **{k: v for k, v in vars(result).items() if k != "bins"})
        if self.banked is not None and self.team.first:
            self.banked.store(result, self._state(name))

    @property
    def planned(self) -> bool:
        """Whether batches are kept, so that there is something to plan."""
        wanted = self.wanted
        kept = wanted.reuse not in (None, 1) or wanted.cache is not None
        return kept or wanted.memory is not None

    @property
    def _spill(self) -> Path:
        folder = self.run.path / "buffer"
        return folder if self.team.size == 1 else folder / f"rank-{self.team.rank}"

    def _supply(self, at: int, generation: Generation) -> tuple[Costs | None, Choice | None]:
        """Choose where the part's batches come from; a resumed run, and every process, keeps the window."""
        wanted = self.wanted
        if not self.planned:
            return None, None
        costs = costs_of(self.work, generation)
        made = choose(
            costs, wanted, Machine.read(self.setting.device, wanted.cache or self.run.path)
        )
        windows: dict[str, list[int]] = dict(self.run.facts.get("windows") or {})
        own = [made.window.batches, made.window.reuse]
        begun = self.team.share(windows.get(str(at), own))
        made = made.keeping(Window(*begun), costs)
        windows[str(at)] = [made.window.batches, made.window.reuse]
        self.run.record(windows=windows)
        generation.activations = supply(generation, costs, made, wanted, self._spill)
        return costs, made

    def _train(
        self,
        at: int,
        generation: Generation,
        state: State | None,
        tensors: Mapping[str, Tensor],
        costs: Costs | None,
        made: Choice | None,
    ) -> None:
        with memory_told(
            generation.students[0].site.name,
            lambda: stage1_advice(costs or costs_of(self.work, generation), made),
        ):
            self._steps(at, generation, state, tensors)
        fresh_folder(self._spill)

    def _steps(
        self, at: int, generation: Generation, state: State | None, tensors: Mapping[str, Tensor]
    ) -> None:
        number = generation.number
        if state is None:
            for done, total in solve_pending(generation, f"init.{number}"):
                self.team.beat()
                self.progress("init", done, total, {})
            stacks: dict[str, list[list[str]]] = dict(self.run.facts.get("stacks") or {})
            generation.begin(self.setting.ranks.share(stacks.get(str(at))))
            # It was decided by time: a run that dies before its first checkpoint would decide anew.
            self.run.record(stacks={**stacks, str(at): generation.state.stacks})
            self._log_start(generation)
        else:
            generation.best = under(tensors, "best.")
        optimiser = generation.make_optimiser()
        if state is not None:
            optimiser.load(under(tensors, "optimiser."))
        else:
            self._save(at, generation, optimiser)
            self._begun()
        total = generation.steps
        for done, values in generation.train(optimiser):
            self.team.beat()
            self._log_step(generation, done, total, values)
            if done < total and self.saver.due(done):
                self._save(at, generation, optimiser)
            self.progress(f"distill {at + 1}/{len(self.work.parts)}", done, total, values)
        if (
            self.keeps_end or self.banked is not None
        ):  # should the bank have no room, nothing is trained twice
            self._save(at, generation, optimiser)
        generation.restore_best()

    def _begun(self) -> None:
        """Called when the first checkpoint of a part is whole, before its first step."""

    # -- log and checkpoint -----------------------------------------------------------------

    def _log_start(self, generation: Generation) -> None:
        for told in self.work.warnings():
            self.run.log(event="warning", site=told.site, code=told.code, message=told.message)
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
        self.run.save(tensors, {**self._facts(part), "state": generation.state.to_dict()})

    def _facts(self, part: int) -> dict[str, Any]:
        return {
            "part": part,
            "results": [vars(r) for r in self.results.values()],
            "steps": self.steps,
            "seconds": self._elapsed(),
        }

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
