"""What stands inside a matched block: `b.attention`, `b.mlp`, and their parts."""

from __future__ import annotations

from graftc.diagnostics import Note, Span, fail
from graftc.operators.spec import Part
from graftc.program.analysis import ATTENTION_ROLES, Analysis, Site
from graftc.program.parts import PartRef, part_refs
from graftc.rewrite.match import Match


def inner_site(analysis: Analysis, block: Site, role: str, span: Span) -> Site:
    """The one site of `role` inside a block. Raises GraftError where there is none, or several."""
    wanted = ATTENTION_ROLES if role == "attention" else (role,)
    inside = [s for s in analysis.sites if s.role in wanted and s.path.startswith(block.path + ".")]
    if len(inside) == 1:
        return inside[0]
    named = sorted({s.role for s in inside})
    fail(
        "G450",
        f"{block.path} has {len(inside) or 'no'} site{'s' if len(inside) != 1 else ''} of role `{role}`",
        span=span,
        site=block.path,
        wanted="one",
        found=", ".join(f"{s.path} ({s.role})" for s in inside) or None,
        notes=[Note(f"{s.path} is {s.role}") for s in _told(analysis, block)] if not inside else (),
        help=f"write `.{named[0]}`, or match the site itself by path" if len(named) > 1 else None,
    )


def _told(analysis: Analysis, block: Site) -> list[Site]:
    shown = [s for s in analysis.sites if s.path.startswith(block.path + ".")]
    return [s for s in shown if s.role not in ("unknown", "linear", "norm")][:6]


def bound_site(analysis: Analysis, match: Match, name: str, span: Span) -> Site:
    """The site of `a` or `b.attention`."""
    binding, _, part = name.partition(".")
    site = match.bindings[binding]
    return inner_site(analysis, site, part, span) if part else site


def part_ref(analysis: Analysis, match: Match, part: Part, span: Span) -> PartRef:
    """Where `b.attention.out` stands. Raises GraftError where it is no affine map, or not there."""
    site = bound_site(analysis, match, part.site, span)
    refs = part_refs(analysis, site.path)
    found = refs.get(part.name or "")
    if isinstance(found, PartRef) and found.computed is None:
        return found
    if isinstance(found, PartRef):
        found = "its weight is computed of others (weight_norm); make it one parameter first"
    fail(
        "G451",
        f"`{part.site}.{part.name}` is no affine map at {site.path}"
        + (f": {found}" if found else ""),
        span=span,
        site=site.path,
        wanted=", ".join(n for n, r in refs.items() if isinstance(r, PartRef))
        or "a site with parts",
    )
