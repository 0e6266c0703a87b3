"""Out of a build: export, verify, bench, report; and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftc.cli.options import (
    BuildArgument,
    FormatOption,
    MaybeData,
    check_format,
    print_json,
    typed,
)

app = typer.Typer()


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
    check_format(format)
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
        command=typed(),
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

    check_format(format)
    result = verbs.verify(
        directory, onnx=onnx, data=data, ep=ep, regions=regions, tolerance=tolerance,
        trajectory=trajectory, command=typed(),
    )  # fmt: skip
    print_json(verification_dict(result)) if format == "json" else show_verification(result)
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

    check_format(format)
    found = verbs.bench(directory, against=against, regions=regions, threads=threads)
    print_json(comparison_dict(found)) if format == "json" else show_comparison(found)


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

    check_format(format)
    findings = verbs.doctor()
    print_json(findings) if format == "json" else show_doctor(findings)
