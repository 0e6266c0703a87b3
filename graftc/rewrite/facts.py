"""The facts of a site that guards and arguments read."""

from __future__ import annotations

from graftc.diagnostics import Span, fail
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
