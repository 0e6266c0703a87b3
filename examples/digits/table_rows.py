"""The rows of the digits table: each a model, made by graftc's verbs, with what it cost to make.

Compute is counted in FLOPs, by the formulas of `FORMULAS`, and told as a share of the teacher's pretraining: wall-clock seconds
would say as much about the machine as about the method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import graftc.verbs as verbs

if TYPE_CHECKING:
    from graftc.emit.build import Build

HERE = Path(__file__).parent
MODEL = f"{HERE / 'model.py'}:teacher"
DATA = f"{HERE / 'data.py'}:images"
LOG = HERE / "train_log.jsonl"
BATCH = 64
"""Of pretraining (`train.py`), of stage 1 and of stage 2."""
SOLVED = 512
"""Samples that graftc reads to fit a least-squares first weight."""

FORMULAS = """\
Compute of a row = training FLOPs after pretraining / FLOPs of pretraining, with T and S the forward FLOPs of teacher and student
and s those of the sites that train (one sample; a backward pass counts as two forward passes):
pretraining = steps x batch x 3T; least-squares first weights = 512 samples x T; stage 1 = steps x batch x (T + 3s);
stage 2 = steps x batch x 3S. Validation and scoring are not counted."""

Progress = Callable[[str, int, int, Mapping[str, float]], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """Training steps of the two stages, and stage 2's rate; None is what the `.graft` file says.

    A stage 2 cut short needs a lower rate: it ends before the file's rate has been halved.
    """

    stage1: int | None = None
    stage2: int | None = None
    rate2: float | None = None

    def finetuning(self) -> dict[str, Any]:
        """The options of `verbs.finetune`."""
        return {"steps": self.stage2, "lr": self.rate2}


@dataclass(frozen=True, eq=False)
class Row:
    """A model to be scored: `compute` is its training FLOPs after pretraining, `flops` a forward pass of one sample."""

    key: str
    name: str
    model: nn.Module
    parameters: int
    flops: int
    compute: float = 0.0


@dataclass(frozen=True, eq=False)
class Grafted:
    """A `.graft` file gone through compile, and through the stages that were asked for; `rows` tell what each left."""

    build: Build
    rows: tuple[Row, ...]

    @property
    def last(self) -> Row:
        return self.rows[-1]


def pretraining_flops(forward: int, log: Path = LOG) -> float:
    """FLOPs of the teacher's training, from the last step in its log."""
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return training_flops(forward, last["step"], BATCH)


def training_flops(forward: float, steps: int, batch: int) -> float:
    """FLOPs of training end to end: forward, and backward at twice the price.

    >>> training_flops(10, steps=2, batch=3)
    180
    """
    return 3 * forward * steps * batch


def distilling_flops(
    teacher: float, sites: Mapping[str, float], steps: Mapping[str, int], batch: int
) -> float:
    """FLOPs of one generation of stage 1: the teacher runs forward as long as any site trains, each site forward and backward.

    >>> distilling_flops(10, {"a": 1, "b": 2}, {"a": 5, "b": 5}, batch=1)
    95
    """
    return batch * (
        teacher * max(steps.values(), default=0)
        + sum(3 * sites[name] * count for name, count in steps.items())
    )


def teacher_row() -> Row:
    """The teacher as it was trained."""
    model = _teacher()
    analysis = verbs.inspect(MODEL)
    return Row("teacher", "teacher", model.module.eval(), analysis.parameters, analysis.flops[""])


def teacher_finetuned(build: Build, budget: Budget, progress: Progress | None = None) -> Row:
    """The teacher given the same stage 2 as a build's student: what the further steps alone are worth."""
    from safetensors.torch import load_file

    run = verbs.finetune(build, DATA, model="teacher", **budget.finetuning(), progress=progress)
    row = teacher_row()
    module = build.teacher().eval()
    module.load_state_dict(load_file(run.weights))
    compute = training_flops(row.flops, run.steps, BATCH)
    return replace(
        row, key="teacher/stage 2", name="teacher, same stage 2", model=module, compute=compute
    )


def graft(
    file: Path,
    output: Path,
    budget: Budget,
    *,
    control: str = "",
    stages: Sequence[str] = ("stage 1", "stage 2"),
    progress: Progress | None = None,
    tell: Callable[[Any], None] = lambda made: None,
) -> Grafted:
    """Compile a `.graft` file on the teacher and train its student; a row for the build, and one for each stage.

    `control` is a control's name in words; there is nothing to train in one but by the same stage 2. `tell` is handed what each
    verb returned, as soon as it did.
    """
    name = control or file.stem
    build = verbs.compile(file, MODEL, output, data=DATA)
    tell(build)
    teacher = build.plan["totals"]["flops"]["before"]
    student = build.plan["totals"]["flops"]["after"]
    sites = build.targets["sites"]
    solved = any(
        edit_weight["pending"] for edit in build.plan["edits"] for edit_weight in edit["weights"]
    )
    first = Row(
        key=f"{file.stem}/untrained",
        name=control or f"{name}, untrained",
        model=build.student().eval(),
        parameters=build.plan["totals"]["parameters"]["after"],
        flops=student,
        compute=SOLVED * teacher if solved else 0.0,
    )
    rows = [first]
    if "stage 1" in stages and sites:
        run = verbs.distill(build, DATA, steps=budget.stage1, progress=progress)
        tell(run)
        steps = {site.name: site.steps for site in run.sites}
        forward = site_flops(build)
        compute = rows[-1].compute + sum(
            distilling_flops(teacher, forward, {site: steps[site] for site in generation}, BATCH)
            for generation in generations(sites)
        )
        rows.append(_after(first, build, run.id, "stage 1", f"{name}, after stage 1", compute))
    if "stage 2" in stages:
        run = verbs.finetune(build, DATA, **budget.finetuning(), progress=progress)
        tell(run)
        compute = rows[-1].compute + training_flops(student, run.steps, BATCH)
        said = f"{name}, {'same' if control else 'after'} stage 2"
        rows.append(_after(first, build, run.id, "stage 2", said, compute))
    return Grafted(build, tuple(rows))


def site_flops(build: Build) -> dict[str, float]:
    """Forward FLOPs of what trains at each site of a build, for one sample.

    A parallel site trains both its branches and the merge, so its price is theirs together.
    """
    import graftc

    found = verbs.inspect(graftc.Model(build.student().eval(), _teacher().inputs)).flops
    return {
        s["name"]: sum(found.get(path, 0) for path in s["trainable"])
        for s in build.targets["sites"]
    }


def generations(sites: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of the sites that train together: those that wait for none, then those that wait for these, …"""
    done: set[str] = set()
    found: list[list[str]] = []
    while len(done) < len(sites):
        ready = [s["name"] for s in sites if s["name"] not in done and done.issuperset(s["after"])]
        found.append(ready)
        done.update(ready)
    return found


def _after(first: Row, build: Build, run: str, stage: str, name: str, compute: float) -> Row:
    key = f"{first.key.partition('/')[0]}/{stage}"
    return replace(
        first,
        key=key,
        name=name,
        model=build.student(run).eval(),
        compute=compute,
    )


@cache
def _teacher() -> Any:
    from model import teacher

    return teacher()
