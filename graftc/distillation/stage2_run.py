"""A run of stage 2 in progress: its steps, its validations and its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError, Note, fail
from graftc.distillation import checkpoint_pieces
from graftc.distillation.advice import stage2_advice
from graftc.distillation.budget import Plan
from graftc.distillation.data import Data
from graftc.distillation.few import few_samples, lines
from graftc.distillation.held_out import shares
from graftc.distillation.inputs import check_inputs
from graftc.distillation.optim import Group, Optimiser, Schedule, clip_or_drop
from graftc.distillation.pieces import Rows, Whole
from graftc.distillation.planner import Machine
from graftc.distillation.planner2 import (
    Stage2Costs,
    Stage2Plan,
    seconds_of,
    stage2_costs,
    update_seconds,
)
from graftc.distillation.preview import Preview, draw, write_sheet
from graftc.distillation.resident import allocator_of, heap_seen
from graftc.distillation.run import CHECKPOINT, Progress, Run
from graftc.distillation.saving import Saver
from graftc.distillation.scopes import random_of
from graftc.distillation.targets import ModelInput, Stage2
from graftc.distillation.terms import Terms, told

PHASE = "stage2"
_HOPELESS = 20
_VALIDATIONS = 8


@dataclass(frozen=True)
class Finetuned:
    """What stage 2 measured. Losses are the task's, over the held-out samples, with fixed noise.

    The module holds the averaged (EMA) weights; `loss_raw` is the loss of the last ones.
    """

    steps: int
    skipped_steps: int
    loss_start: float
    loss_raw: float
    loss_end: float
    seconds: float
    curve: tuple[tuple[int, float], ...] = field(default=())
    warnings: tuple[str, ...] = ()


@dataclass
class _State:
    step: int = 0
    skipped: int = 0
    loss_start: float = math.nan
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])


class Stage2Run:
    """A run of stage 2 in progress."""

    def __init__(
        self,
        own: Whole,
        loss: Terms,
        data: Data,
        terms: Stage2,
        plan: Plan,
        names: Sequence[str],
        inputs: Sequence[ModelInput],
        seed: int,
        device: str,
        run: Run | None,
    ) -> None:
        self.own, self.loss, self.data, self.plan = own, loss, data, plan
        self.module, self.ranks = own.module, own.ranks
        self.rows = self.ranks.rows(plan.batch)
        self.task = loss.task
        self.terms, self.inputs, self.seed, self.device = terms, inputs, seed, device
        self.run = run
        self.beside: nn.Module | None = None
        """A teacher that is in memory too, whatever the loss needs of it."""
        chosen = {name: own.parameters[name] for name in names}
        # A process may have no row of a small parameter.
        self.parameters = {n: p for n, p in chosen.items() if n not in own.rows or len(own.rows[n])}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.count = len(names)
        self.state = _State()
        warmup = min(terms.warmup, max(1, plan.steps // 10))
        schedule = Schedule(plan.steps, warmup, "constant", terms.halve_lr_at)
        self.optimiser = Optimiser("adamw", [Group("model", self.parameters, plan.lr, schedule)])
        self.started = time.monotonic()

    def run_all(self, saver: Saver, progress: Progress, sheet: Sheets) -> Finetuned:
        self._load()
        warned = few_samples(self.data, self.plan.batch)
        if self.state.step == 0:
            for one in warned:
                self._log(event="warning", site=one.site, code=one.code, message=one.message)
            self.state.loss_start = self.validate()
            self._log(event="start", steps=self.plan.steps, batch=self.plan.batch,
                      lr=self.plan.lr, samples=self.data.size, parameters=self.count,
                      held_out=len(self.data.held_out), loss=self.state.loss_start)  # fmt: skip
            self._log(event="step", step=0, held_out=self.state.loss_start)
            sheet(0)
        total, in_a_row = self.plan.steps, 0
        every = max(1, -(-total // _VALIDATIONS))
        for step in range(self.state.step, total):
            loss, norm, good, parts = self._step(step)
            in_a_row = 0 if good else in_a_row + 1
            if in_a_row >= _HOPELESS:
                fail("G545", f"stage 2 gave no finite gradient in {_HOPELESS} steps", site="stage 2",
                     found=f"loss {loss} at step {step}",
                     help="lower `lr`; the last checkpoint is whole")  # fmt: skip
            done = self.state.step = step + 1
            values = {"loss": loss, "norm": norm, **parts}
            if done % every == 0 and done < total:
                values["held_out"] = self.validate()
                self.state.curve.append((done, values["held_out"]))
            if done % max(1, total // 200) == 0 or done % every == 0 or done == total:
                self._log(event="step", step=done, **values)
            sheet(done)
            if done < total and saver.due(done):
                self._save()
            progress("finetune", done, total, values)
        raw = self.validate()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.ema[name])
        end = self.validate()
        self._log(event="step", step=total, held_out=raw, held_out_average=end)
        self._log(event="finished", loss_raw=raw, loss=end, skipped_steps=self.state.skipped)
        curve = ((0, self.state.loss_start), *self.state.curve, (total, raw))
        return Finetuned(
            total, self.state.skipped, self.state.loss_start, raw, end,
            round(self._elapsed(), 2), curve, lines(warned),
        )  # fmt: skip

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.run is not None and (self.run.path / CHECKPOINT).is_file()

    def planned(self) -> Stage2Plan:
        """What the run will take, for one process that has the whole model. Raises GraftError (G841)."""
        prepared, loss = self._first(), self.loss.alone()
        trained = list(self.parameters.values())
        # Run first: what is wrong with model, task or DATA is told as itself, not as sizes that are not known.
        with heap_seen(allocator_of(self.device)) as seen:
            seconds = seconds_of(self.module, loss, trained, prepared, self.seed, self.device)
            allocator = seen()
        costs = replace(
            self._costs(prepared),
            seconds=seconds,
            update=update_seconds(trained),
            allocator=allocator,
        )
        folder = Path.cwd() if self.run is None else self.run.path
        return Stage2Plan(costs, Machine.read(self.device, folder))

    def _first(self) -> Any:
        made = self.data.prepared(self.task, 0, self.plan.batch, PHASE, self.rows)
        return self._checked(made, "the first batch")

    def _costs(self, prepared: Any) -> Stage2Costs:
        if self.own.rows:
            fail("G841", "the sizes of a model in pieces are not computed", site="stage 2")
        loss = self.loss.alone()
        sizes = stage2_costs(self.module, loss, self.parameters, prepared, self.device, self.beside)
        return replace(
            sizes,
            steps=self.plan.steps,
            batch=len(self.rows),
            held_out=len(self.data.held_out),
            previews=self.terms.preview is not None,
            ranks=self.ranks.size,
        )

    def smaller(self) -> tuple[str, str]:
        """What this run was expected to take, and the next smaller setting."""
        try:
            costs = self._costs(self._first())
        except (GraftError, RuntimeError, MemoryError):
            costs = None  # no room, or no way, to compute it: what is known without is told
        trained = sum(p.nbytes for p in self.parameters.values())
        return stage2_advice(self.module, self.terms, self.plan.batch, trained, self.device, costs)

    def _step(self, step: int) -> tuple[float, float, bool, dict[str, float]]:
        self.module.train()
        prepared = self._checked(
            self.data.prepared(self.task, step, self.plan.batch, PHASE, self.rows), f"step {step}"
        )
        self.optimiser.zero()
        with random_of(self.seed, PHASE, step, *self.ranks.key(), device=self.device):
            loss, parts = self.loss(prepared)
            (loss * self.ranks.size).backward()  # DDP and FSDP2 take the mean
        self.own.collect()
        parameters = list(self.parameters.values())
        # One transfer for all numbers; a term of its own is told where there are several.
        names = list(parts) if len(parts) > 1 else []
        told_parts = [parts[name].detach().float().reshape(()) for name in names]
        sums = torch.stack([loss.detach(), *told_parts])
        self.ranks.add([sums])
        norm_of_all = self.own.norm().to(sums).reshape(1)
        value, *numbers, norm = torch.cat([sums, norm_of_all]).tolist()
        good = clip_or_drop(parameters, norm + 0 * value, self.terms.clip)
        if good:
            self.optimiser.step(step)
        else:
            self.state.skipped += 1
        decay = min(self.terms.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            average: list[Tensor] = list(self.ema.values())
            newest: list[Tensor] = list(parameters)
            torch._foreach_lerp_(average, newest, 1 - decay)
        return value, norm, good, dict(zip(names, numbers, strict=True))

    @contextmanager
    def averaged(self) -> Generator[nn.Module]:
        """The module with the averaged weights, which is what will be saved; then as it was."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.ema[name])
        try:
            yield self.module
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(kept[name])

    def validate(self) -> float:
        """The task's mean loss over the held-out samples, always with the same noise."""
        self.module.eval()
        chunks, factor = shares(len(self.data.held_out), self.plan.batch, self.ranks)
        total, count = 0.0, 0.0
        with torch.no_grad():
            for i, rows in enumerate(chunks):
                (made,) = self.data.validation(self.task, len(rows), rows)
                prepared = self._checked(made, f"held-out batch {i}")
                weight = self.loss.weight(prepared)
                with self.loss.cast():
                    loss = self.loss.task_loss(self.module(**prepared.inputs), prepared)
                if not loss.isfinite():
                    self._not_finite(loss, prepared.inputs, i)
                if weight:
                    total, count = total + float(loss) * weight, count + weight
        total, count = self.ranks.total([[factor * total, factor * count]])[0]
        return total / count if count else math.nan

    def _not_finite(self, loss: Tensor, inputs: Mapping[str, Tensor], batch: int) -> NoReturn:
        """A loss that is measured on nothing says nothing: the run ends here."""
        bad = [f"`{name}`" for name, value in inputs.items() if not value.isfinite().all()]
        fail("G840", f"the task's loss is {float(loss)} on held-out batch {batch}", site="stage 2",
             wanted="a finite number, by which the run is judged",
             found=f"NaN or Inf in input {', '.join(bad)}" if bad else "finite inputs",
             notes=(Note(f"after {self.state.step} steps; the last checkpoint, where there is one, is whole"),),
             help="look at DATA for this batch" if bad else
             "lower `lr`; or look at the task's loss and the model's precision")  # fmt: skip

    def _checked(self, prepared: Any, where: str) -> Any:
        with told("TASK.prepare"):
            inputs = prepared.inputs
        check_inputs(inputs, self.inputs, where)
        with told("TASK.prepare"):
            return prepared.to(self.device)

    def _elapsed(self) -> float:
        return self.state.seconds + time.monotonic() - self.started

    def _log(self, **values: Any) -> None:
        if self.run is not None:
            self.run.log(**values)

    def _save(self) -> None:
        if self.run is None:
            return
        tensors: dict[str, Tensor] = {}
        rows: dict[str, Rows] = {}
        for name, value, part in self._tensors():
            tensors[name] = value
            if part is not None:
                rows[name] = part
        facts = {"state": {**vars(self.state), "seconds": self._elapsed()}}
        checkpoint_pieces.save(self.run, self.ranks, tensors, rows, facts, self.state.step)

    def _tensors(self) -> Iterator[tuple[str, Tensor, Rows | None]]:
        """All that a checkpoint holds, and which rows of it these are, of what is in pieces."""
        rows = self.own.rows
        for name, parameter in self.parameters.items():
            yield f"model.{name}", parameter, rows.get(name)
            yield f"ema.{name}", self.ema[name], rows.get(name)
        for name, buffer in self.module.named_buffers():
            yield f"model.{name}", buffer, None
        for full, value in self.optimiser.state().items():
            name = full.rpartition(".")[0]
            yield f"optimiser.{full}", value, rows.get(name) if value.ndim else None

    def _load(self) -> None:
        found = checkpoint_pieces.load(self.run) if self.run is not None else None
        if found is None:
            return
        rows = self.own.rows
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.read(f"model.{name}", rows.get(name)))
                self.ema[name].copy_(found.read(f"ema.{name}", rows.get(name)))
            for name, buffer in self.module.named_buffers():
                buffer.copy_(found.read(f"model.{name}"))
        kept: dict[str, Tensor] = {}
        for full in found.names("optimiser."):
            name, _, key = full.rpartition(".")
            if name in self.parameters:
                part = None if key == "step" else rows.get(name)
                kept[full] = found.read(f"optimiser.{full}", part)
        self.optimiser.load(kept)
        self.state = _State(**found.facts["state"])
        self.state.curve = [(int(s), float(x)) for s, x in found.facts["state"]["curve"]]


Sheets = Callable[[int], None]


def sheets(engine: Stage2Run, preview: Preview | None, teacher: nn.Module | None) -> Sheets:
    """Writes a sheet of samples when it is due: at step 0, every `preview.every` steps, and at the end.

    The last is `samples/student.png` (of tokens, `student.txt`), with the averaged weights; with step 0's comes the teacher's, from
    the same noise. Without a run there is nowhere to write them, and nothing is drawn.
    """
    run = engine.run
    if preview is None or run is None:
        return lambda step: None
    folder = run.path / "samples"

    def sheet(step: int) -> None:
        last = step == engine.plan.steps
        if step % preview.every and not last:
            return
        if not (engine.ranks.first or engine.own.rows):  # a model in pieces is drawn from by all
            return
        with engine.averaged() as module:
            found = draw(module, engine.task, preview, engine.data.held_out, engine.seed)
        name = "student" if last else f"step-{step:06d}"
        about = {"seed": engine.seed, "step": step, "count": preview.count,
                 "noise": f"seeded('preview', {engine.seed})"}  # fmt: skip
        if engine.ranks.first:
            file = write_sheet(folder, name, found, engine.task, about)
            run.log(event="samples", file=f"samples/{file}", **about)
        if step == 0 and teacher is not None:
            theirs = draw(teacher, engine.task, preview, engine.data.held_out, engine.seed)
            if engine.ranks.first:
                theirs_about = {**about, "step": "teacher"}
                write_sheet(folder, "teacher", theirs, engine.task, theirs_about)

    return sheet
