"""Training a build: distill, finetune; the bank and the check before a long run (sites.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graftc.cli import sites, targets
from graftc.cli.options import (
    BankOption,
    BuildArgument,
    DataOption,
    FormatOption,
    MaybeSeed,
    TaskOption,
    check_format,
    print_json,
    typed,
)
from graftc.cli.progress import Progress

app = typer.Typer()


def _training(
    verb: str,
    directory: Path,
    data: str,
    task: str | None,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from graftc import verbs
    from graftc.cli.render import run_dict, show_run
    from graftc.distillation.ranks import joined

    try:
        # Joined before anything is read, so that one rank tells what is wrong with it.
        with joined(options.get("device") or "cpu") as ranks, Progress() as progress:
            result = getattr(verbs, verb)(
                directory,
                data,
                task=task,
                progress=progress if ranks.first else None,
                command=typed(),
                **{k: v for k, v in options.items() if v is not None},
            )
    except KeyboardInterrupt:
        print("interrupted: `--resume ID` goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    if ranks.first:
        print_json(run_dict(result)) if as_json else show_run(result)


def _tell_unplanned(running: dict[str, Any]) -> None:
    """Say which options a dry run does not count."""
    said = [f"--{name.replace('_', '-')}" for name, value in running.items() if value is not None]
    if said:
        print(f"not in this plan: {', '.join(said)}", file=sys.stderr)


StepsOption = Annotated[
    int | None, typer.Option(help="optimiser steps; default: the file's, or the engine's")
]
BatchOption = Annotated[int | None, typer.Option(help="samples a step")]
RateOption = Annotated[float | None, typer.Option("--lr", help="learning rate")]
BoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="TensorBoard events too, in the run's folder")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, …; under `torchrun`, cuda is each rank's own card")
]
ResumeOption = Annotated[
    str | None, typer.Option("--resume", metavar="ID", help="go on with an interrupted run")
]

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="show time, memory and disk, and stop there")
]


@app.command()
def distill(
    directory: BuildArgument,
    data: DataOption,
    task: TaskOption = None,
    steps: StepsOption = None,
    batch: BatchOption = None,
    lr: RateOption = None,
    seed: MaybeSeed = None,
    resume: ResumeOption = None,
    bank: BankOption = None,
    tensorboard: BoardOption = False,
    reuse: Annotated[
        str | None,
        typer.Option(metavar="R", help="steps that each teacher batch is used for, or `auto`"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="what the run may take in all: 8GB")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="BYTES", help="what kept teacher batches may take on disk")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="keep the teacher's batches here, for later runs too"),
    ] = None,
    site_by_site: Annotated[
        bool, typer.Option("--site-by-site", help="one site after the other: the memory of one")
    ] = False,
    device: DeviceOption = "cpu",
    compile_teacher: Annotated[
        bool, typer.Option("--compile", help="the teacher's pass through torch.compile (fullgraph)")
    ] = False,
    dry_run: DryRunOption = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="WAY", help="how the ranks of `torchrun` share the work: data or sites"
        ),
    ] = None,
    shard_teacher: Annotated[
        bool,
        typer.Option("--shard-teacher", help="a piece of the teacher in each rank (FSDP2)"),
    ] = False,
    format: FormatOption = "text",
) -> None:
    """Stage 1: train each new operator on the teacher's activations."""
    from functools import partial

    from graftc import verbs
    from graftc.cli.plans import show_training_plan

    check_format(format)
    options: dict[str, Any] = {"steps": steps, "batch": batch, "lr": lr, "seed": seed}
    kept: dict[str, Any] = {"reuse": _reuse(reuse), "memory": memory, "disk": disk, "cache": cache}
    kept |= {"site_by_site": site_by_site or None, "device": device}
    options |= kept
    running: dict[str, Any] = {
        "resume": resume, "bank": bank, "tensorboard": tensorboard or None, "compile": compile_teacher or None,
        "parallel": parallel, "shard_teacher": shard_teacher or None,
    }  # fmt: skip
    if dry_run:
        _tell_unplanned(running)
        given = {k: v for k, v in options.items() if v is not None}
        plan = verbs.plan_distill(directory, data, task=task, **given)
        print_json(plan.to_dict()) if format == "json" else show_training_plan(plan)
        return
    options |= {**running, "announce": partial(show_training_plan, to_stderr=True)}
    _training("distill", directory, data, task, options, as_json=format == "json")


def _reuse(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"--reuse takes a number or `auto`, found {text!r}")
    return int(text)


@app.command()
def finetune(
    directory: BuildArgument,
    data: DataOption,
    task: TaskOption = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="ID",
            help="the run to start from, or `untrained`; default: the latest of stage 1",
        ),
    ] = None,
    steps: StepsOption = None,
    batch: BatchOption = None,
    lr: RateOption = None,
    seed: MaybeSeed = None,
    warmup: Annotated[int | None, typer.Option(help="steps over which the rate rises")] = None,
    ema: Annotated[float | None, typer.Option(help="decay of the averaged weights")] = None,
    clip: Annotated[float | None, typer.Option(help="largest norm of the gradient")] = None,
    task_weight: Annotated[float | None, typer.Option(help="weight of the task's loss")] = None,
    teacher_weight: Annotated[
        float | None, typer.Option(help="weight of the teacher's output in the loss")
    ] = None,
    features_weight: Annotated[
        float | None, typer.Option(help="weight of the sites' outputs in the loss")
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="WHAT", help="all, inserted, or lora(RANK)")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast)")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="compute blocks again in the backward pass")
    ] = False,
    preview: Annotated[
        int | None, typer.Option(metavar="N", help="a sheet of samples every N steps")
    ] = None,
    preview_steps: Annotated[
        int | None, typer.Option(help="steps of the sampler for a sheet; default: the task's")
    ] = None,
    device: DeviceOption = "cpu",
    resume: ResumeOption = None,
    tensorboard: BoardOption = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="how the ranks of `torchrun` have the model: data (DDP) or pieces (FSDP2)",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    format: FormatOption = "text",
) -> None:
    """Stage 2: train the whole student on the task's loss, and on the teacher where it is asked to."""
    from functools import partial

    from graftc import verbs
    from graftc.cli.plans import show_stage2_plan

    check_format(format)
    options: dict[str, Any] = {
        "run": run, "steps": steps, "batch": batch, "lr": lr, "seed": seed, "warmup": warmup,
        "ema": ema, "clip": clip, "task_weight": task_weight, "teacher_weight": teacher_weight,
        "features_weight": features_weight, "train": train, "precision": precision, "device": device,
        "checkpointing": checkpointing or None, "preview": preview,
        "preview_options": None if preview_steps is None else {"steps": preview_steps},
    }  # fmt: skip
    running = {"resume": resume, "tensorboard": tensorboard or None, "parallel": parallel}
    if dry_run:
        _tell_unplanned(running)
        given = {k: v for k, v in options.items() if v is not None}
        plan = verbs.plan_finetune(directory, data, task=task, **given)
        print_json(plan.to_dict()) if format == "json" else show_stage2_plan(plan)
        return
    options |= {**running, "announce": partial(show_stage2_plan, to_stderr=True)}
    _training("finetune", directory, data, task, options, as_json=format == "json")


app.command()(sites.bank)
app.command(name="check-distill")(sites.check_distill)
app.command()(targets.targets)
