"""The facts of a site that guards and arguments read."""

from __future__ import annotations

from collections.abc import Mapping

from graftc.diagnostics import Span, fail
from graftc.language.rules import Fact
from graftc.operators.spec import Value
from graftc.program.analysis import Site


def site_fact(site: Site, name: str, span: Span | None) -> Value:
    """A fact of a site; an error that says which facts it has where it lacks this one."""
    if name not in site.facts:
        fail(
            "G321",
            f"{site.path} ({site.role}) has no `{name}`",
            span=span,
            site=site.path,
            wanted=", ".join(sorted(site.facts)),
            found=name,
        )
    return site.facts[name]


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
    return site_fact(site, fact.name, fact.span)
