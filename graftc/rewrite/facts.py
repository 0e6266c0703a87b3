"""The facts of a site that guards and arguments read."""

from __future__ import annotations

from collections.abc import Mapping

from graftc.diagnostics import fail
from graftc.language.evaluate import shown
from graftc.language.rules import Fact
from graftc.operators.spec import Value
from graftc.program.analysis import Site
from graftc.program.measured import FAMILY


def site_fact(site: Site, fact: Fact) -> Value:
    """A fact of a site; an error that says which facts it has where it lacks this one.

    A measured one is an error too where nothing was measured, or the site has no such measure.
    """
    if fact.name in FAMILY:
        return measure_of(site, fact)
    if fact.name not in site.facts:
        fail(
            "G321",
            f"{site.path} ({site.role}) has no `{fact.name}`",
            span=fact.span,
            site=site.path,
            wanted=", ".join(sorted(site.facts)),
            found=fact.name,
        )
    return site.facts[fact.name]


def bound_fact(fact: Fact, bindings: Mapping[str, Site]) -> Value:
    """A fact that an argument or an `init` reads, of a site that the rule binds. Raises GraftError."""
    site = bindings.get(fact.binding)
    if site is None:
        fail(
            "G442",
            f"`{fact.binding}` is inside a block, and only `where` reads facts there",
            span=fact.span,
            wanted=", ".join(f"`{b}`" for b in bindings),
            found=f"`{fact.binding}`",
            help="match the site itself, beside the block or in its place",
        )
    return site_fact(site, fact)


def measure_of(site: Site, fact: Fact) -> float:
    """A measured fact of a site. Raises GraftError: nothing was measured (G135), or not here (G488)."""
    family = FAMILY[fact.name]
    had = site.measured
    if had is None:
        fail(
            "G135",
            f"`{shown(fact) if fact.binding else fact.name}` is measured on data",
            span=fact.span,
            wanted="a `-d DATA` of raw samples to measure on",
            help="give `-d DATA` (and `-t TASK`, where the model names none)",
        )
    band = fact.options.get("band")
    value = had.value(fact.name, band if isinstance(band, int) else None)
    if value is None:
        reason = (had.why or {}).get(family, "its output is constant")
        fail(
            "G488",
            f"{site.path} has no `{fact.name}`: {reason}",
            span=fact.span,
            site=site.path,
            help="narrow the match to sites that have it",
        )
    return value
