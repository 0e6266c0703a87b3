"""`a, m = self_attention then mlp`: sites that follow each other in the data flow."""

from __future__ import annotations

from collections.abc import Callable

from graftc.diagnostics import Note, fail
from graftc.language.rules import SequenceMatch, SiteMatch
from graftc.program.analysis import ATTENTION_ROLES, Analysis, Site
from graftc.program.flat import Op

Sites = Callable[[SiteMatch, Analysis], list[Site]]


def sequences(
    pattern: SequenceMatch, sites_of: Sites, analysis: Analysis
) -> list[tuple[Site, ...]]:
    """Every row of neighbours: each reads what the one before made, with no other site of these roles between.

    `sites_of` finds the sites of a pattern of one site: those of each role, in the selected blocks.
    Raises GraftError where no site of the first role is followed by one of the second, and so on.
    """
    groups = [
        sites_of(
            SiteMatch(name, pattern.span, role, within=pattern.within, blocks=pattern.blocks),
            analysis,
        )
        for name, role in zip(pattern.bindings, pattern.roles, strict=True)
    ]
    between = {s.path for role in pattern.roles for s in _of_role(role, analysis)}
    rows = [(site,) for site in groups[0]]
    for wanted in groups[1:]:
        follows = {s.path: s for s in wanted}
        rows = [
            (*row, follows[path])
            for row in rows
            if (path := _next(row[-1], between, analysis)) in follows
        ]
    if not rows:
        _none(pattern, groups, between, analysis)
    return rows


def _of_role(role: str, analysis: Analysis) -> list[Site]:
    roles = ATTENTION_ROLES if role == "attention" else (role,)
    return [s for s in analysis.sites if s.role in roles]


def _next(site: Site, between: set[str], analysis: Analysis) -> str | None:
    """The nearest of the sites `between` that the site's output flows into."""
    call = analysis.flat.first_calls[site.path]
    results = call.result if isinstance(call.result, (tuple, list)) else (call.result,)
    waiting = [r for r in results if isinstance(r, Op)]
    seen: set[int] = set()
    nearest: Op | None = None
    while waiting:
        op = waiting.pop()
        for user in op.users:
            if user.index in seen or (nearest is not None and user.index > nearest.index):
                continue
            seen.add(user.index)
            inside = _holder(user.path, between)
            if inside is None or inside == site.path:
                waiting.append(user)
            elif nearest is None or user.index < nearest.index:
                nearest = user
    return _holder(nearest.path, between) if nearest is not None else None


def _holder(path: str, sites: set[str]) -> str | None:
    """The innermost of the sites that holds a path."""
    while path:
        if path in sites:
            return path
        path = path.rpartition(".")[0]
    return None


def _none(
    pattern: SequenceMatch, groups: list[list[Site]], between: set[str], analysis: Analysis
) -> None:
    site = groups[0][0]
    after = _next(site, between, analysis)
    role = next((s.role for s in analysis.sites if s.path == after), None)
    fail(
        "G310",
        f"no {' then '.join(pattern.roles)}: {site.path} is followed by "
        + (f"{after} ({role})" if after else "no site of these roles"),
        span=pattern.span,
        site=site.path,
        notes=[Note(f"{s.path} is {s.role}") for g in groups for s in g[:3]],
        help="name the roles in the order in which the data flows",
    )
