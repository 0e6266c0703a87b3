"""`finetune`: stage 2 of a build as a run of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graftc.diagnostics import fail
from graftc.distillation.advice import loading_advice
from graftc.distillation.checkpoint import load_tensors
from graftc.distillation.data import Task
from graftc.distillation.optim import align
from graftc.distillation.out_of_memory import memory_told
from graftc.distillation.planner2 import Stage2Plan
from graftc.distillation.preview import Preview
from graftc.distillation.ranks import device_of, joined
from graftc.distillation.run import Build, Progress, RunResult, finished, latest, open_run
from graftc.distillation.scopes import usable_device, using_threads
from graftc.distillation.sharing import sharing2
from graftc.distillation.stage2 import Which, finetune_module, plan_module, terms_of
from graftc.distillation.targets import Lora, Only, Site, Stage2, Targets, Train
from graftc.distillation.targets_file import from_dict
from graftc.distillation.tensorboard import board_of

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
    task_weight: float | None = None,
    teacher_weight: float | None = None,
    features_weight: float | None = None,
    train: str | None = None,
    precision: str | None = None,
    checkpointing: bool | None = None,
    preview: int | None = None,
    preview_options: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    validation: Any = None,
    resume: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    checkpoint_every: int | None = None,
    parallel: str | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[Stage2Plan], None] | None = None,
) -> RunResult:
    """Finetune a build's student end to end on the task's loss; the run is `DIR/runs/ID`.

    `run` is the stage-1 run to start from: an ID, "untrained", or None for the newest that is
    finished (untrained where there is none). `model="teacher"` gives the teacher the same stage 2
    (parent: none). What is given overrides `stage2` of the targets: the weights of its terms, `train`
    ("all", "inserted" or "lora(RANK)"), `precision` ("float32" or "bfloat16"), activation
    `checkpointing`, `preview` (a sheet of samples every so many steps, drawn with `preview_options` for
    the Task's `sample`); `resume`, `tensorboard` and `sources` as in `distill`. The
    result's weights are the EMA ones; its metrics are the task's loss over the held-out samples.
    `announce` gets the plan with its predictions before anything is trained (`plan_finetune` stops there).

    Under `torchrun` each process takes its rows of every batch (`docs/scale.md`): with the whole model in each by
    `parallel="data"` (DDP), or with student and teacher in pieces by "pieces" (FSDP2). A run may be resumed with
    another number of processes, and in the other way. They return the same result.
    """
    usable_device(device_of(device))
    targets = from_dict(build.targets)
    parent = _parent(build, run, model) if resume is None else None
    given: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "warmup": warmup,
        "ema": ema,
        "clip": clip,
        "samples": samples,
        "task": task_weight,
        "teacher": teacher_weight,
        "features": features_weight,
        "train": train,
        "precision": precision,
        "checkpointing": checkpointing,
        "preview": preview,
        "preview_options": None if preview_options is None else dict(preview_options),
        "threads": threads,
    }
    defaults = {"seed": 0, "threads": torch.get_num_threads()}
    options = (
        given if resume else {k: defaults.get(k) if v is None else v for k, v in given.items()}
    )
    stage = "finetune" if model == "student" else "teacher"
    if parent is not None:
        finished(build.path, parent)  # before a directory is made
    with (
        joined(device) as ranks,
        open_run(
            build,
            stage,
            options=options,
            parent=parent,
            resume=resume,
            sources=sources,
            ranks=ranks,
        ) as opened,
    ):
        if (done := opened.result()) is not None:
            return done
        chosen = opened.options
        board = board_of(opened, tensorboard and ranks.first)
        room = memory_told("--device", lambda: loading_advice(device))
        with using_threads(chosen["threads"]), board, room:
            mode = sharing2(ranks, parallel, opened)
            module = _module(build, model, opened.facts["parent"])
            result = finetune_module(
                module,
                task,
                data,
                **_arguments(build, targets, chosen, model),
                validation=validation,
                device=ranks.device if ranks.size > 1 else device,
                run=opened,
                checkpoint_every=checkpoint_every,
                progress=progress if ranks.first else None,
                announce=announce if ranks.first and mode != "pieces" else None,
                ranks=ranks,
                pieces=mode == "pieces",
            )
        metrics = {"loss_start": result.loss_start, "loss_raw": result.loss_raw,
                   "loss_end": result.loss_end, "skipped_steps": result.skipped_steps}  # fmt: skip
        weights = opened.path / f"{model}.safetensors"
        made = RunResult(opened.id, opened.path, stage, weights, result.steps, result.seconds, metrics=metrics, warnings=result.warnings)  # fmt: skip
        return opened.finish(module.state_dict(), made)


def plan_finetune(
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
    task_weight: float | None = None,
    teacher_weight: float | None = None,
    features_weight: float | None = None,
    train: str | None = None,
    precision: str | None = None,
    checkpointing: bool | None = None,
    preview: int | None = None,
    preview_options: Mapping[str, Any] | None = None,
    validation: Any = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Stage2Plan:
    """What `finetune` with these options would take; a step is run a few times, to time it, and nothing is written.

    Raises GraftError as `finetune`, and where the sizes of a step cannot be computed (G841).
    """
    usable_device(device)
    parent = _parent(build, run, model)
    room = memory_told("--device", lambda: loading_advice(device))
    with using_threads(threads or torch.get_num_threads()), room:
        module = _module(build, model, parent)
        chosen: dict[str, Any] = {
            "seed": 0 if seed is None else seed,
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "warmup": warmup,
            "ema": ema,
            "clip": clip,
            "samples": samples,
            "task": task_weight,
            "teacher": teacher_weight,
            "features": features_weight,
            "train": train,
            "precision": precision,
            "checkpointing": checkpointing,
            "preview": preview,
            "preview_options": preview_options,
        }
        given = _arguments(build, from_dict(build.targets), chosen, model)
        return plan_module(module, task, data, **given, validation=validation, device=device)


def _parent(build: Build, run: str | None, model: Which) -> str | None:
    """The run of stage 1 that stage 2 starts from."""
    if model != "student" or run == UNTRAINED:
        return None
    return run or latest(build.path, "distill")


def _arguments(
    build: Build, targets: Targets, chosen: Mapping[str, Any], model: Which
) -> dict[str, Any]:
    """What `finetune_module` is called with, of a build and the options that were chosen."""
    changes = {name: chosen.get(name) for name in _TERMS}
    if isinstance(changes["train"], str):
        changes["train"] = train_of(changes["train"], targets.stage2)
    terms = terms_of(targets.stage2, changes)
    needed = terms.teacher > 0 or terms.features > 0 or terms.preview is not None
    return {
        "stage2": terms,
        "inserted": _inserted(targets, model),
        "inputs": targets.inputs,
        "seed": chosen["seed"],
        "steps": chosen.get("steps"),
        "batch": chosen.get("batch"),
        "lr": chosen.get("lr"),
        "teacher": align(build.teacher()) if needed else None,
        "sites": _sites(targets, model),
        "preview": _preview(terms, chosen.get("preview_options")),
    }


_TERMS = (
    "warmup",
    "ema",
    "clip",
    "samples",
    "task",
    "teacher",
    "features",
    "train",
    "precision",
    "checkpointing",
    "preview",
)


def train_of(text: str, stage2: Stage2) -> Train:
    """`all`, `inserted` (what the targets call so), `lora(8)`, `lora(8, 16)`: what stage 2 trains.

    Raises GraftError (G556) for anything else.

    >>> train_of("lora(8, 16)", Stage2())
    Lora(rank=8, alpha=16.0)
    """
    if text == "all":
        return "all"
    if text == "inserted":
        return stage2.train if isinstance(stage2.train, Only) else "inserted"
    found = re.fullmatch(r"lora\(\s*(\d+)\s*(?:,\s*([\d.]+)\s*)?\)", text)
    if found is None or int(found[1]) < 1:
        fail("G556", f"stage 2 cannot train `{text}`", site="train", found=text,
             wanted="all, inserted, lora(RANK) or lora(RANK, ALPHA)")  # fmt: skip
    return Lora(int(found[1]), float(found[2]) if found[2] else None)


def _sites(targets: Targets, model: Which) -> list[Site]:
    """The sites whose outputs the features term compares; of the teacher, against itself as it was."""
    sites = list(targets.sites)
    return sites if model == "student" else [replace(s, student=s.teacher) for s in sites]


def _preview(terms: Stage2, options: Mapping[str, Any] | None) -> Preview | None:
    return None if terms.preview is None else Preview(terms.preview, options=options or {})


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
