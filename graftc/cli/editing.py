"""From a file and a model to a build: inspect, check, test, fmt, lsp, plan, explain, compile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graftc.cli.options import (
    AllowOption,
    BankOption,
    CacheOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    GraphOption,
    MaybeData,
    ModelOption,
    SamplesOption,
    SeedOption,
    SetOption,
    TaskOption,
    ToOption,
    WeightsOption,
    check_format,
    overrides,
    print_json,
    typed,
)

app = typer.Typer()


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="file.py:function, package.module:function, diffusers:CLASS@FOLDER, or model.pt2",
        ),
    ],
    weights: WeightsOption = None,
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

    check_format(format)
    analysis = verbs.inspect(
        model,
        weights=weights,
        data=data,
        task=task,
        samples=samples,
        seed=seed,
        cache=cache,
        graph=graph,
    )
    print_json(analysis_dict(analysis)) if format == "json" else show_analysis(analysis)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    set_: SetOption = None,
    format: FormatOption = "text",
) -> None:
    """Check the syntax and meaning of .graft files, without a model."""
    from graftc.diagnostics import Diagnostic, GraftError, render, to_json
    from graftc.language.check import check as check_file

    check_format(format)
    problems: list[Diagnostic] = []
    good: list[dict[str, Any]] = []
    for file in files:
        try:
            rules = check_file(file, overrides(set_))
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
        print_json({"diagnostics": [], "files": good})


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

    check_format(format)
    results = verbs.test_files(files, overrides=overrides(set_), allow_python=allow_python or ())
    print_json(results_dict(results)) if format == "json" else show_results(results)
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
    weights: WeightsOption = None,
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
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "fp32",
    to: ToOption = "torch",
    format: FormatOption = "text",
) -> None:
    """Show what a file does to a model; nothing is changed."""
    from graftc import verbs
    from graftc.cli.render import show_plan
    from graftc.diagnostics import render, to_json
    from graftc.rewrite.plan_text import plan_dict

    check_format(format)
    made = verbs.plan(
        file, model, weights=weights, data=data, task=task, overrides=overrides(set_),
        allow_python=allow_python or (), samples=samples, seed=seed, cache=cache, output=output,
        graph=graph, device=device, dtype=dtype, to=to,
    )  # fmt: skip
    if format == "json":
        print_json({**plan_dict(made), "notes": [to_json(n) for n in made.notes]})
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
    weights: WeightsOption = None,
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

    check_format(format)
    found = verbs.explain(
        file, model, rule, at=at, weights=weights, data=data, task=task, overrides=overrides(set_),
        allow_python=allow_python or (), samples=samples, seed=seed, cache=cache,
    )  # fmt: skip
    print_json(explanations_dict(found)) if format == "json" else show_explanations(found, at)


@app.command(name="compile")
def compile_(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    model: ModelOption,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="the build directory")
    ],
    weights: WeightsOption = None,
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
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "fp32",
    to: ToOption = "torch",
    format: FormatOption = "text",
) -> None:
    """Make the student and its distillation targets."""
    check_format(format)
    from graftc import verbs
    from graftc.cli.render import show_build

    build = verbs.compile(
        file,
        model,
        output,
        weights=weights,
        data=data,
        task=task,
        overrides=overrides(set_),
        allow_python=allow_python or (),
        seed=seed,
        samples=samples,
        cache=cache,
        copy_teacher=copy_teacher,
        student_weights=student_weights,
        device=device,
        dtype=dtype,
        to=to,
        command=typed(),
    )
    show_build(build, say_next=bank is None)
    if bank is not None:
        from graftc.cli.sites import show_assembly

        show_assembly(build, verbs.assemble(build, bank, data, task=task, command=typed()))
