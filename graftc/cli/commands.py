"""The commands."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graftc.cli import sites
from graftc.cli.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Edit pretrained transformers: match, replace, distil, export, verify.",
)

ModelOption = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        help="MODEL: file.py:function, package.module:function, or diffusers:CLASS@FOLDER",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "-d", "--data", help="DATA: file.py:function, a folder of safetensors shards, or hf:NAME"
    ),
]
MaybeData = Annotated[
    str | None,
    typer.Option(
        "-d", "--data", help="DATA: file.py:function, a folder of safetensors shards, or hf:NAME"
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "-t", "--task", help="TASK: a shipped name, or file.py:Task; default: the model's own"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="override a `set` parameter of the file: name=value"),
]
AllowOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-python",
        metavar="FILE.py",
        help="run this Python file, which a rule names (operators, patterns)",
    ),
]
FormatOption = Annotated[str, typer.Option("--format", help="text or json")]
SamplesOption = Annotated[
    int, typer.Option("--samples", help="samples of DATA that measured selectors are measured on")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="where measures are kept; default: ~/.cache/graftc/measures"
    ),
]
GraphOption = Annotated[
    Path | None,
    typer.Option("--graph", metavar="OUT.svg", help="draw the chains of blocks, before and after"),
]
BuildArgument = Annotated[Path, typer.Argument(help="a build directory made by `graftc compile`")]
MaybeSeed = Annotated[
    int | None, typer.Option("--seed", help="seed of every random choice; default 0")
]
BankOption = Annotated[
    Path | None,
    typer.Option("--bank", metavar="BANK", help="a directory of trained sites, used and added to"),
]
SeedOption = Annotated[int, typer.Option(help="seed of every random choice")]


def _overrides(given: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in given or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set takes name=value, found {item!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def _format(value: str) -> str:
    if value not in ("text", "json"):
        raise typer.BadParameter(f"--format is text or json, found {value!r}")
    return value


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _command() -> str:
    """What was typed, for the build's record; the program by name, wherever it lies."""
    return shlex.join(["graftc", *sys.argv[1:]])


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="file.py:function, package.module:function, or diffusers:CLASS@FOLDER",
        ),
    ],
    data: MaybeData = None,
    task: TaskOption = None,
    samples: SamplesOption = 64,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    graph: GraphOption = None,
    format: FormatOption = "text",
) -> None:
    """Show roles, chains of blocks, sites, parameters and FLOPs of a model; with -d, what is measured at its sites."""
    from graftc import verbs
    from graftc.cli.render import analysis_dict, show_analysis

    _format(format)
    analysis = verbs.inspect(
        model, data=data, task=task, samples=samples, seed=seed, cache=cache, graph=graph
    )
    _json(analysis_dict(analysis)) if format == "json" else show_analysis(analysis)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    set_: SetOption = None,
    format: FormatOption = "text",
) -> None:
    """Check the syntax and meaning of .graft files, without a model."""
    from graftc.diagnostics import Diagnostic, GraftError, render, to_json
    from graftc.language.check import check as check_file

    _format(format)
    problems: list[Diagnostic] = []
    good: list[dict[str, Any]] = []
    for file in files:
        try:
            rules = check_file(file, _overrides(set_))
        except GraftError as error:
            problems += error.diagnostics
            continue
        notes = [to_json(n) for n in rules.notes]
        good.append({"file": str(file), "rules": [r.name for r in rules.rules], "notes": notes})
        if format == "text":
            print(f"{file}: ok, {len(rules.rules)} rule{'s' * (len(rules.rules) != 1)}")
            for note in rules.notes:
                print(render(note), file=sys.stderr)
    if problems:
        raise GraftError(*problems)
    if format == "json":
        _json({"diagnostics": [], "files": good})


@app.command(name="test")
def run_tests(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    set_: SetOption = None,
    allow_python: AllowOption = None,
    format: FormatOption = "text",
) -> None:
    """Run the tests in .graft files: rules on small graphs, structure and numbers."""
    from graftc import verbs
    from graftc.cli.tests import results_dict, show_results

    _format(format)
    results = verbs.test_files(files, overrides=_overrides(set_), allow_python=allow_python or ())
    _json(results_dict(results)) if format == "json" else show_results(results)
    if not all(r.passed for r in results):
        raise typer.Exit(1)


@app.command()
def fmt(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    check_only: Annotated[
        bool, typer.Option("--check", help="change nothing; exit 1 if a file would change")
    ] = False,
) -> None:
    """Format .graft files in place."""
    from graftc import verbs

    changed = verbs.format_files(files, write=not check_only)
    for file in changed:
        print(f"{'would format' if check_only else 'formatted'} {file}")
    if check_only and changed:
        raise typer.Exit(1)


@app.command()
def lsp(
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="MODEL whose chains and paths are completed"),
    ] = None,
) -> None:
    """Serve an editor: a language server over standard input and output."""
    from graftc import verbs

    verbs.serve_editor(model)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    model: ModelOption,
    data: MaybeData = None,
    task: TaskOption = None,
    set_: SetOption = None,
    allow_python: AllowOption = None,
    samples: SamplesOption = 64,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="write the plan as YAML")
    ] = None,
    graph: GraphOption = None,
    format: FormatOption = "text",
) -> None:
    """Show what a file does to a model; nothing is changed."""
    from graftc import verbs
    from graftc.cli.render import show_plan
    from graftc.diagnostics import render, to_json
    from graftc.rewrite.plan_text import plan_dict

    _format(format)
    made = verbs.plan(
        file, model, data=data, task=task, overrides=_overrides(set_),
        allow_python=allow_python or (), samples=samples, seed=seed, cache=cache, output=output,
        graph=graph,
    )  # fmt: skip
    if format == "json":
        _json({**plan_dict(made), "notes": [to_json(n) for n in made.notes]})
        return
    show_plan(made)
    for note in made.notes:
        print(render(note), file=sys.stderr)


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    model: ModelOption,
    rule: Annotated[
        str | None, typer.Argument(metavar="[RULE]", help="one rule; default: all")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="PATH", help="only this module, however far it is"),
    ] = None,
    data: MaybeData = None,
    task: TaskOption = None,
    set_: SetOption = None,
    allow_python: AllowOption = None,
    samples: SamplesOption = 64,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    format: FormatOption = "text",
) -> None:
    """Say what each rule selects in a model, and what keeps it from the places it nearly does."""
    from graftc import verbs
    from graftc.cli.explanation import show_explanations
    from graftc.rewrite.whynot import explanations_dict

    _format(format)
    found = verbs.explain(
        file, model, rule, at=at, data=data, task=task, overrides=_overrides(set_),
        allow_python=allow_python or (), samples=samples, seed=seed, cache=cache,
    )  # fmt: skip
    _json(explanations_dict(found)) if format == "json" else show_explanations(found, at)


@app.command(name="compile")
def compile_(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    model: ModelOption,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="the build directory")
    ],
    data: MaybeData = None,
    task: TaskOption = None,
    set_: SetOption = None,
    allow_python: AllowOption = None,
    seed: SeedOption = 0,
    samples: SamplesOption = 64,
    cache: CacheOption = None,
    copy_teacher: Annotated[
        bool, typer.Option("--copy-teacher", help="copy the teacher's weights into the build")
    ] = False,
    student_weights: Annotated[
        Path | None,
        typer.Option(
            "--student-weights",
            metavar="FILE",
            help="a trained student's state dict: safetensors, or of torch.save (key `ema`)",
        ),
    ] = None,
    bank: BankOption = None,
    format: FormatOption = "text",
) -> None:
    """Make the student and its distillation targets."""
    _format(format)
    from graftc import verbs
    from graftc.cli.render import show_build

    build = verbs.compile(
        file,
        model,
        output,
        data=data,
        task=task,
        overrides=_overrides(set_),
        allow_python=allow_python or (),
        seed=seed,
        samples=samples,
        cache=cache,
        copy_teacher=copy_teacher,
        student_weights=student_weights,
        command=_command(),
    )
    show_build(build, say_next=bank is None)
    if bank is not None:
        from graftc.cli.sites import show_assembly

        show_assembly(build, verbs.assemble(build, bank, data, task=task, command=_command()))


def _training(
    verb: str, directory: Path, data: str, task: str | None, options: dict[str, Any]
) -> None:
    from graftc import verbs
    from graftc.cli.render import show_run

    try:
        with Progress() as progress:
            result = getattr(verbs, verb)(
                directory,
                data,
                task=task,
                progress=progress,
                command=_command(),
                **{k: v for k, v in options.items() if v is not None},
            )
    except KeyboardInterrupt:
        print("interrupted: `--resume ID` goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    show_run(result)


StepsOption = Annotated[
    int | None, typer.Option(help="optimiser steps; default: the file's, or the engine's")
]
BatchOption = Annotated[int | None, typer.Option(help="samples a step")]
RateOption = Annotated[float | None, typer.Option("--lr", help="learning rate")]
BoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="TensorBoard events too, in the run's folder")
]
ResumeOption = Annotated[
    str | None, typer.Option("--resume", metavar="ID", help="go on with an interrupted run")
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show time, memory and disk, and stop there")
    ] = False,
    format: FormatOption = "text",
) -> None:
    """Stage 1: train each new operator on the teacher's activations."""
    from functools import partial

    from graftc import verbs
    from graftc.cli.render import show_training_plan

    _format(format)
    options: dict[str, Any] = {"steps": steps, "batch": batch, "lr": lr, "seed": seed}
    kept: dict[str, Any] = {"reuse": _reuse(reuse), "memory": memory, "disk": disk, "cache": cache}
    kept["site_by_site"] = True if site_by_site else None
    if dry_run:
        given = {k: v for k, v in (options | kept).items() if v is not None}
        plan = verbs.plan_distill(directory, data, task=task, **given)
        _json(plan.to_dict()) if format == "json" else show_training_plan(plan)
        return
    announce = partial(show_training_plan, to_stderr=True)
    options |= {
        **kept,
        "resume": resume,
        "announce": announce,
        "bank": bank,
        "tensorboard": tensorboard or None,
    }
    _training("distill", directory, data, task, options)


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
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    resume: ResumeOption = None,
    tensorboard: BoardOption = False,
    format: FormatOption = "text",
) -> None:
    """Stage 2: train the whole student on the task's loss, and on the teacher where it is asked to."""
    _format(format)
    options: dict[str, Any] = {
        "run": run, "steps": steps, "batch": batch, "lr": lr, "seed": seed, "resume": resume, "warmup": warmup,
        "ema": ema, "clip": clip, "task_weight": task_weight, "teacher_weight": teacher_weight,
        "features_weight": features_weight, "train": train, "precision": precision, "device": device,
        "checkpointing": checkpointing or None, "preview": preview, "tensorboard": tensorboard or None,
        "preview_options": None if preview_steps is None else {"steps": preview_steps},
    }  # fmt: skip
    _training("finetune", directory, data, task, options)


@app.command()
def export(
    directory: BuildArgument,
    to: Annotated[str, typer.Option("--to", help="onnx or tensorrt")] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="a directory; or FILE.onnx, one file"),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="ID",
            help="whose weights; default: the latest finished run's; or `untrained`",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16")] = "fp32",
    dynamic: Annotated[
        str | None, typer.Option(metavar="batch=1:2:8,…", help="smallest:usual:largest sizes")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="RUNTIME", help="ort-1.20, trt-10.9, triton-25.04, …")
    ] = None,
    opset: Annotated[str, typer.Option(help="auto, or a number")] = "auto",
    data: MaybeData = None,
    format: FormatOption = "text",
) -> None:
    """Write the student for a runtime, with golden files and what was proved of it."""
    _format(format)
    from graftc import verbs
    from graftc.cli.render import show_export

    written = verbs.export(
        directory,
        to=to,
        output=output,
        run=run,
        precision=precision,
        dynamic=dynamic,
        target=target,
        opset=opset,
        data=data,
    )
    show_export(written)


@app.command()
def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="an export directory, or a build with student.onnx"),
    ],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", metavar="FILE", help="default: the build's own")
    ] = None,
    data: MaybeData = None,
    ep: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or tensorrt-rtx")] = "cpu",
    regions: Annotated[
        bool, typer.Option("--regions", help="compare each region, and name the first that is off")
    ] = False,
    tolerance: Annotated[float | None, typer.Option(help="in place of the precision's own")] = None,
    trajectory: Annotated[
        int | None,
        typer.Option(
            "--trajectory", metavar="N", help="N steps of the task's sampler, in torch and here"
        ),
    ] = None,
    format: FormatOption = "text",
) -> None:
    """Check an export; each check PASS, FAIL or NOT RUN."""
    from graftc import verbs
    from graftc.cli.render import show_verification, verification_dict

    _format(format)
    result = verbs.verify(
        directory, onnx=onnx, data=data, ep=ep, regions=regions, tolerance=tolerance,
        trajectory=trajectory, command=_command(),
    )  # fmt: skip
    _json(verification_dict(result)) if format == "json" else show_verification(result)
    if not result.passed:
        raise typer.Exit(1)
    if result.missed:
        raise typer.Exit(3)


@app.command()
def bench(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="an export directory")],
    against: Annotated[Path, typer.Option("--against", metavar="OTHER", help="another one")],
    regions: Annotated[
        bool, typer.Option("--regions", help="where the time goes, by region and by rule")
    ] = False,
    threads: Annotated[int, typer.Option(help="threads of ONNX Runtime")] = 2,
    format: FormatOption = "text",
) -> None:
    """Time an export against another, in ONNX Runtime on this machine."""
    from graftc import verbs
    from graftc.cli.render import comparison_dict, show_comparison

    _format(format)
    found = verbs.bench(directory, against=against, regions=regions, threads=threads)
    _json(comparison_dict(found)) if format == "json" else show_comparison(found)


@app.command()
def report(
    directory: BuildArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="the HTML file")
    ] = Path("report.html"),
) -> None:
    """Write one HTML file on a build: what was done to the model, and what came of it."""
    from graftc import verbs

    print(f"wrote {verbs.report(directory, output)}")


@app.command()
def doctor(format: FormatOption = "text") -> None:
    """Say what is installed, what is missing, and what each part would need."""
    from graftc import verbs
    from graftc.cli.render import show_doctor

    _format(format)
    findings = verbs.doctor()
    _json(findings) if format == "json" else show_doctor(findings)


app.command()(sites.bank)
app.command(name="check-distill")(sites.check_distill)


@app.callback(invoke_without_command=True)
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[bool, typer.Option("--version", help="show the version")] = False,
) -> None:
    if version:
        from graftc import __version__

        print(f"graftc {__version__}")
        raise typer.Exit
