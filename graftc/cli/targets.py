"""`graftc targets`: what a build would train, and the same for another trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli.options import BuildArgument, FormatOption, check_format, print_json

if TYPE_CHECKING:
    from graftc.distillation.targets import Site, Targets

TRAINERS = ("modelopt",)


def targets(
    directory: BuildArgument,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="TRAINER", help="modelopt: a file for NVIDIA Model-Optimizer's engine"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.py", help="where to write it")
    ] = None,
    format: FormatOption = "text",
) -> None:
    """Show a build's distillation targets; with --to, write them for another trainer."""
    from graftc import verbs

    check_format(format)
    if to is not None and to not in TRAINERS:
        raise typer.BadParameter(f"--to is {' or '.join(TRAINERS)}, found {to!r}")
    if (to is None) != (output is None):
        raise typer.BadParameter("--to and -o go together: --to modelopt -o FILE.py")
    if to is None or output is None:
        from graftc.distillation.targets_file import load_targets, to_dict

        found = load_targets(directory)
        print_json(to_dict(found)) if format == "json" else _show(found)
        return
    made = verbs.export_targets(directory, output)
    if format == "json":
        pairs = [{"student": s, "teacher": t, "loss": said} for (s, t), said in made.pairs.items()]
        said: dict[str, Any] = {"file": str(output), "pairs": pairs, "left_out": made.left_out}
        print_json({**said, "differs": list(made.differs)})
        return
    print(f"wrote {output}: {len(made.pairs)} sites")
    for name, why in made.left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    for line in made.differs:
        print(f"otherwise than `graftc distill`: {line}", file=sys.stderr)


def _show(found: Targets) -> None:
    from graftc.cli.render import count, wide_console, wide_table

    rows = wide_table("site", "operator", "trains", "loss", "steps", "bytes a sample", "FLOPs")
    for site in found.sites:
        sample = site.sample
        rows.add_row(
            site.name,
            " or ".join(c.operator for c in site.candidates) or site.operator,
            "exact" if site.exact and not site.candidates else ", ".join(site.trainable),
            _loss(site),
            "engine's" if site.budget.steps is None else str(site.budget.steps),
            "" if sample is None else f"{sample.bytes:,}",
            ""
            if sample is None
            else f"{count(sample.teacher_flops)} → {count(sample.student_flops)}",
        )
    wide_console().print(rows)
    print(f"{len(found.sites)} site{'s' * (len(found.sites) != 1)}")


def _loss(site: Site) -> str:
    weight = f" × {site.loss.weight:g}" if site.loss.weight != 1 else ""
    return f"{site.loss.kind}{weight}{', by the gate' if site.teacher.gate else ''}"
