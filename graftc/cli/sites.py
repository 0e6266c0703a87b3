"""The commands on trained sites: what a bank holds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftc.distillation.assemble import Assembly
    from graftc.distillation.bank import Entry, Merged
    from graftc.emit.build import Build

FormatOption = Annotated[str, typer.Option("--format", help="text or json")]


def bank(
    directory: Annotated[Path, typer.Argument(metavar="BANK", help="a bank's directory")],
    action: Annotated[
        str, typer.Argument(metavar="[list|prune|merge]", help="what to do; default: list")
    ] = "list",
    others: Annotated[
        list[Path] | None, typer.Argument(metavar="[OTHER...]", help="banks to merge into BANK")
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="GLOB", help="only these sites")
    ] = None,
    operator: Annotated[
        str | None, typer.Option("--operator", metavar="GLOB", help="only these operators")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", help="prune: written before")
    ] = None,
    not_best: Annotated[
        bool,
        typer.Option("--not-best", help="prune: where another run of the same has a lower error"),
    ] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="prune: whose files are not those that were written")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="prune: say what would go, remove nothing")
    ] = False,
    format: FormatOption = "text",
) -> None:
    """List, prune or merge trained sites that `--bank` stored."""
    from graftc.diagnostics import fail
    from graftc.distillation.bank import Bank
    from graftc.distillation.bank_prune import Chosen, select

    if format not in ("text", "json"):
        raise typer.BadParameter(f"--format is text or json, found {format!r}")
    if action not in ("list", "prune", "merge"):
        raise typer.BadParameter(f"wanted list, prune or merge, found {action!r}")
    if bool(others) != (action == "merge"):
        raise typer.BadParameter("merge takes the banks to merge: graftc bank BANK merge OTHER")
    as_json = format == "json"
    if action == "merge":
        merged = [
            (other, Bank.open(directory, create=True).merge(Bank.open(other)))
            for other in others or []
        ]
        _json([_merged_dict(o, m) for o, m in merged]) if as_json else _show_merged(merged)
        if any(m.conflicts for _, m in merged):
            raise typer.Exit(1)
        return
    opened = Bank.open(directory)
    wanted = Chosen(site, operator, older_than, not_best, damaged)
    if action == "list":
        found = select(opened, wanted)
        _json([e.to_dict() for e in found]) if as_json else _show(found)
        return
    if not wanted.anything:
        fail("G577", "prune needs to know what", site=str(directory),
             wanted="--site, --operator, --older-than, --not-best or --damaged")  # fmt: skip
    gone = select(opened, wanted)
    broken = [p for p in opened.damaged() if isinstance(p, Path)] if damaged else []
    if not dry_run:
        opened.remove(gone)
        opened.remove_folders(broken)
    if as_json:
        _json({"removed": [e.key for e in gone], "unreadable": [p.name for p in broken], "dry_run": dry_run})  # fmt: skip
        return
    _show(gone)
    for folder in broken:
        print(f"unreadable: {folder}")
    count = len(gone) + len(broken)
    print(f"{'would remove' if dry_run else 'removed'} {_entries(count)}")


def check_distill(
    directory: Annotated[Path, typer.Argument(help="a build directory made by `graftc compile`")],
    data: Annotated[str, typer.Option("-d", "--data", help="DATA: a function that yields samples")],
    task: Annotated[str | None, typer.Option("-t", "--task", help="TASK, as for distill")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="how many to learn by heart; default: 8, or as many as a site has parameters for",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="at most so many for a site")] = 1000,
    seed: Annotated[int, typer.Option(help="of the data's order and the noise")] = 0,
    format: FormatOption = "text",
) -> None:
    """Before a long run: can each site learn a few samples by heart? Exit code 1 where one cannot."""
    from dataclasses import asdict

    from graftc import verbs
    from graftc.cli.render import wide_console, wide_table

    if format not in ("text", "json"):
        raise typer.BadParameter(f"--format is text or json, found {format!r}")
    found = verbs.check_distill(directory, data, task=task, samples=samples, steps=steps, seed=seed)
    if format == "json":
        _json([{**_finite(asdict(c)), "passed": c.passed} for c in found])
    else:
        rows = wide_table(
            "site", "", "self-graft", "loss at start", "loss at end", "wanted", "error", "samples", "steps"
        )  # fmt: skip
        for c in found:
            figures = (c.self_graft, c.loss_start, c.loss_end, c.wanted, c.error_end)
            rows.add_row(
                c.name,
                "PASS" if c.passed else "FAIL",
                *(f"{x:.2g}" for x in figures),
                f"{c.rows} rows" if c.rows else str(c.samples),
                str(c.steps),
            )
        wide_console().print(rows)
        print("losses are the site's own, as a share of what a prediction of zero costs")
        for c in found:
            if c.note or not c.passed:
                said = "; ".join(x for x in (c.reason, c.note) if x)
                print(f"{c.name} ({c.operator}): {said}", file=sys.stderr)
    if not all(c.passed for c in found):
        raise typer.Exit(1)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not measured is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def show_assembly(build: Build, found: Assembly) -> None:
    """What a bank had for a build, and what comes next."""
    for name, entry in found.found.items():
        print(
            f"  {name}: from the bank, error {entry.error:.4f} "
            f"(run {entry.source['run']} of {entry.source['build']})"
        )
    for missing in found.missing:
        print(f"  {missing.site}: to be trained; {missing.why}")
    if found.run is not None:
        print(f"assembled: run {found.run.id}, {len(found.found)} sites, nothing was trained")
        print(f"next: graftc finetune {build.path} -d DATA")
    elif found.missing:
        print(f"next: graftc distill {build.path} -d DATA --bank {found.bank}")


def _show(entries: list[Entry]) -> None:
    from graftc.cli.render import wide_console, wide_table
    from graftc.units import size_text

    rows = wide_table("site", "operator", "error at start", "error at end", "steps", "from", "key")
    for e in entries:
        rows.add_row(
            e.identity.site,
            e.identity.operator,
            f"{e.result['error_start']:.4f}",
            f"{e.error:.4f}",
            str(e.result["steps"]),
            f"{e.source['run']} of {Path(e.source['build']).name}",
            e.key[:12],
        )
    if entries:
        wide_console().print(rows)
    print(f"{_entries(len(entries))}, {size_text(sum(e.bytes for e in entries))}")


def _show_merged(merged: list[tuple[Path, Merged]]) -> None:
    for other, done in merged:
        print(
            f"{other}: {_entries(len(done.added))} added, {len(done.same)} were there, "
            f"{len(done.conflicts)} in conflict"
        )
        for ours, theirs in done.conflicts:
            print(
                f"  {ours.identity.site} {ours.identity.operator} ({ours.key[:12]}): other weights under "
                f"the same key; ours (error {ours.error:.6f}, run {ours.source['run']}) stay, theirs have "
                f"error {theirs.error:.6f} (run {theirs.source['run']} of {theirs.source['build']})",
                file=sys.stderr,
            )


def _merged_dict(other: Path, done: Merged) -> dict[str, Any]:
    return {
        "from": str(other),
        "added": [e.key for e in done.added],
        "same": [e.key for e in done.same],
        "conflicts": [{"ours": a.to_dict(), "theirs": b.to_dict()} for a, b in done.conflicts],
    }


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
