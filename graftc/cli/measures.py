"""Measures of a model's sites, as a table for people and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.program.analysis import Analysis, Site
    from graftc.rewrite.plan import Plan

_BANDS = (4, 16, 32, 64, 256, 1024)


def _bands(sites: tuple[Site, ...]) -> list[int]:
    """The bands that say something: narrower than the longest sequence."""
    lengths = [
        len(s.measured.within) for s in sites if s.measured and s.measured.within is not None
    ]
    return [b for b in _BANDS if b < max(lengths, default=0) - 1]


def measures_dict(site: Site) -> dict[str, Any]:
    """What was measured at a site, under `measured`; nothing where nothing was."""
    had = site.measured
    if had is None:
        return {}
    found: dict[str, Any] = {}
    if had.within is not None:
        found["locality"] = {str(b): had.value("locality", b) for b in _bands((site,))}
    if had.influence is not None:
        found["influence"] = had.influence
    if had.statistics is not None:
        s = had.statistics
        found |= {"mean": s.mean, "std": s.std, "absmax": s.absmax, "kurtosis": s.kurtosis}
    return {"measured": found} if found else {}


def show_measures(analysis: Analysis, console: Console) -> None:
    """A row for each attention, mlp and block: locality at a few bands, influence, statistics."""
    from rich.table import Table

    from graftc.diagnostics import render
    from graftc.rewrite.plan_text import measured_on_text

    assert analysis.measured is not None
    console.print(f"\n{measured_on_text(analysis.measured)}")
    for note in analysis.measured.notes:
        console.print(render(note))
    bands = _bands(analysis.sites)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site", no_wrap=True)
    for name in (*(f"|i-j|<={b}" for b in bands), "influence", "mean", "std", "absmax", "kurtosis"):
        table.add_column(name, justify="right")
    for site in analysis.sites:
        had = site.measured
        if had is None or (had.within, had.influence, had.statistics) == (None, None, None):
            continue
        values = [had.value("locality", b) for b in bands]
        values += [had.value(n) for n in ("influence", "mean", "std", "absmax", "kurtosis")]
        table.add_row(site.path, *("" if v is None else f"{v:.3g}" for v in values))
    console.print(table)
    for site in analysis.sites:
        why = (site.measured.why if site.measured else None) or {}
        if site.role in ("self_attention", "joint_attention", "block"):
            for family in ("influence",) if site.role == "block" else ("locality",):
                if family in why:
                    console.print(f"no {family} of {site.path}: {why[family]}")


def show_selectors(plan: Plan, console: Console) -> None:
    """The values that measured selectors chose by, and what they were measured on."""
    from graftc.rewrite.plan_text import listing_lines, measured_on_text

    if plan.measured is None:
        return
    console.print(measured_on_text(plan.measured))
    for matches in plan.selections:
        for listing in matches.measured:
            console.print(f"rule `{matches.rule.name}`, `{listing.selector}`:")
            for line in listing_lines(listing):
                console.print(line)
