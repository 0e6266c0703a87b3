"""`finetune`: stage 2 of a build as a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftc.diagnostics import fail
from graftc.distillation.checkpoint import load_tensors
from graftc.distillation.data import Task
from graftc.distillation.optim import align
from graftc.distillation.run import Build, Progress, RunResult, finished, latest, open_run
from graftc.distillation.scopes import using_threads
from graftc.distillation.stage2 import Which, finetune_module, terms_of
from graftc.distillation.targets import Only, Targets, from_dict

UNTRAINED = "untrained"
"""As `run`: start from the student as it was compiled."""


def finetune(
    build: Build,
    data: Any,
    task: Task,
    *,
    run: str | None = None,
    model: Which = "student",
    seed: int | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    ema: float | None = None,
    clip: float | None = None,
    samples: int | None = None,
    validation: Any = None,
    resume: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    checkpoint_every: int | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Finetune a build's student end to end on the task's loss; the run is `DIR/runs/ID`.

    `run` is the stage-1 run to start from: an ID, "untrained", or None for the newest that is
    finished (untrained where there is none). `model="teacher"` gives the teacher the same stage 2
    (parent: none). What is given overrides `stage2` of the targets; `resume` and
    `sources` as in `distill`. The
    result's weights are the EMA ones; its metrics are the task's loss over the held-out samples.
    """
    targets = from_dict(build.targets)
    parent = None
    if model == "student" and resume is None and run != UNTRAINED:
        parent = run or latest(build.path, "distill")
    given: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "warmup": warmup,
        "ema": ema,
        "clip": clip,
        "samples": samples,
        "threads": threads,
    }
    defaults = {"seed": 0, "threads": torch.get_num_threads()}
    options = (
        given if resume else {k: defaults.get(k) if v is None else v for k, v in given.items()}
    )
    stage = "finetune" if model == "student" else "teacher"
    if parent is not None:
        finished(build.path, parent)  # before a directory is made
    with open_run(
        build, stage, options=options, parent=parent, resume=resume, sources=sources
    ) as opened:
        if (done := opened.result()) is not None:
            return done
        chosen = opened.options
        changes = {name: chosen[name] for name in ("warmup", "ema", "clip", "samples")}
        with using_threads(chosen["threads"]):
            module = _module(build, model, opened.facts["parent"])
            result = finetune_module(
                module,
                task,
                data,
                stage2=terms_of(targets.stage2, changes),
                inserted=_inserted(targets, model),
                inputs=targets.inputs,
                seed=chosen["seed"],
                steps=chosen["steps"],
                batch=chosen["batch"],
                lr=chosen["lr"],
                validation=validation,
                device=device,
                run=opened,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
        return opened.finish(
            module.state_dict(),
            RunResult(
                id=opened.id,
                path=opened.path,
                stage=stage,
                weights=opened.path / f"{model}.safetensors",
                steps=result.steps,
                seconds=result.seconds,
                metrics={
                    "loss_start": result.loss_start,
                    "loss_raw": result.loss_raw,
                    "loss_end": result.loss_end,
                    "skipped_steps": result.skipped_steps,
                },
            ),
        )


def _module(build: Build, model: Which, parent: str | None) -> nn.Module:
    """The teacher, or the student with the weights of the parent run."""
    module = align(build.teacher() if model == "teacher" else build.student())
    if parent is not None:
        weights = finished(build.path, parent).weights
        state, _ = load_tensors(weights)
        lost = module.load_state_dict(state, strict=False)
        if lost.missing_keys or lost.unexpected_keys:
            name = (*lost.missing_keys, *lost.unexpected_keys)[0]
            fail("G566", f"the run `{parent}` was trained for another student", site=str(weights),
                 found=f"`{name}` is in one of the two only", help="distill again")  # fmt: skip
    return module


def _inserted(targets: Targets, model: Which) -> list[str]:
    """What `train: inserted` trains: the sites' parameters; in the teacher, what stands there."""
    if model == "student":
        if isinstance(targets.stage2.train, Only):
            return list(targets.stage2.train.prefixes)
        return [prefix for site in targets.sites for prefix in site.trainable]
    cuts = [site.teacher for site in targets.sites]
    return [path for cut in cuts for path in (cut.output, *(i.call for i in cut.inputs))]
