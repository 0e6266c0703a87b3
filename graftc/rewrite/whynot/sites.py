"""Near misses of patterns on sites: each condition of the rule, judged apart at each place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

from graftc.language.rules import GroupMatch, Rule, SiteMatch
from graftc.language.vocabulary import ATTENTION
from graftc.program.analysis import ATTENTION_ROLES, Site
from graftc.rewrite.globs import path_matches
from graftc.rewrite.whynot.blocks import Chosen, chosen
from graftc.rewrite.whynot.change import Change, Miss
from graftc.rewrite.whynot.guards import guard_changes
from graftc.rewrite.whynot.paths import near_class, near_path
from graftc.rewrite.whynot.places import Places
from graftc.rewrite.whynot.roles import role_change
from graftc.rewrite.whynot.site_edits import (
    blocks_edits,
    chain_edits,
    everywhere_edits,
    name_edits,
    neighbours,
    path_edits,
    role_edits,
)

NEAR = 3.9
"""A script of more is no near miss: another role costs 4."""


def site_misses(
    rule: Rule, pattern: SiteMatch, places: Places, taken: Collection[str]
) -> Iterator[Miss]:
    """Every place that the pattern nearly matches; `taken` are paths that it does match."""
    sets = pattern_sets(pattern, places)
    for block_set in sets:
        if block_set is not None:
            yield from _beyond(pattern, block_set)
        judged = [
            (s, site_miss(rule, pattern, s, places, block_set))
            for s in _worth(pattern, places, taken, block_set)
        ]
        selected = [s for s, miss in judged if miss is None]
        for site, miss in judged:
            if miss is not None and miss.cost <= NEAR:
                if selected and any(c.kind == "guard" for c in miss.changes):
                    again = site_miss(rule, pattern, site, places, block_set, selected)
                    yield again if again is not None else miss
                else:
                    yield miss


def pattern_sets(pattern: SiteMatch, places: Places) -> tuple[Chosen | None, ...]:
    """What the pattern's block set means in each chain; (None,) where it has none."""
    if pattern.blocks is None:
        return (None,)
    return chosen(pattern.blocks, places.analysis, list(_of_kind(pattern, places)))


def _beyond(pattern: SiteMatch | GroupMatch, block_set: Chosen) -> Iterator[Miss]:
    """Blocks that the rule names and that the chain has not."""
    for index in block_set.beyond[:1]:
        extra = _chain_change(pattern, block_set)
        change = block_set.beyond_change().edited(blocks_edits(pattern.blocks, block_set.inside))
        path = block_set.chain.paths[0].rpartition(".")[0] or block_set.chain.name
        yield Miss(f"{path}.{index}", (*extra, change), alike=len(block_set.beyond) - 1)


def _worth(
    pattern: SiteMatch, places: Places, taken: Collection[str], block_set: Chosen | None
) -> Iterator[Site]:
    """The sites that are worth judging: of the right kind anywhere; of another only where nothing is of the right one."""
    analysis = places.analysis
    right = list(_of_kind(pattern, places))
    yield from (s for s in right if s.path not in taken)
    if pattern.role is None:
        if not right:
            yield from analysis.sites
        return
    if block_set is None:
        if not right:
            yield from analysis.sites
        return
    served = {s.block for s in right}
    for index in block_set.inside:
        block = (block_set.chain.name, index)
        if block not in served:
            yield from places.by_block.get(block, ())


def _of_kind(pattern: SiteMatch, places: Places) -> Iterator[Site]:
    analysis = places.analysis
    if pattern.role is not None:
        return analysis.of_role(pattern.role)
    if pattern.path is not None:
        wanted = pattern.path
        return (s for s in analysis.sites if path_matches(wanted, s.path))
    name = pattern.class_name or ""
    return (s for s in analysis.sites if s.class_name == name or s.class_name.endswith("." + name))


def site_miss(
    rule: Rule,
    pattern: SiteMatch,
    site: Site,
    places: Places,
    block_set: Chosen | None = None,
    selected: Sequence[Site] = (),
) -> Miss | None:
    """The script that would make the pattern match this site; None where it does already.

    `selected`: sites that the rule selects as it is, and should go on doing so.
    """
    changes = [
        *_kind_changes(pattern, site, places, block_set),
        *_within_changes(pattern, site, places, block_set),
    ]
    if block_set is not None:
        changes += _block_changes(pattern, block_set, site)
    others = [{pattern.binding: s} for s in selected]
    guards = guard_changes(rule.where, {pattern.binding: site}, places.analysis, others)
    of_another_kind = any(c.kind == "role" for c in changes)
    changes += [g for g in guards if not (of_another_kind and "has no `" in g.text)]
    if not changes:
        return None
    line = next((c.source for c in changes if c.source), None)
    return Miss(site.path, tuple(changes), line or places.line(site.path))


def _kind_changes(
    pattern: SiteMatch, site: Site, places: Places, block_set: Chosen | None
) -> list[Change]:
    if pattern.role is not None:
        change = role_change(pattern.role, site, places, pattern.span)
        if change is None:
            return []
        near = pattern.role in ATTENTION and site.role in ATTENTION_ROLES
        return [change.edited(role_edits(pattern, site, places, block_set, near))]
    if pattern.path is not None:
        near = near_path(pattern.path, site.path)
        if near is None:
            return [Change("path", 4.0, f'is not `module "{pattern.path}"`', pattern.span)]
        if near.distance == 0:
            return []
        said = f'`module "{pattern.path}"` is near: "{near.pattern}" matches it'
        fix = f'write `module "{near.pattern}"`'
        change = Change("path", 0.5 + near.distance, said, pattern.span, fix)
        return [change.edited(name_edits(pattern, near.pattern))]
    name = pattern.class_name or ""
    if site.class_name == name or site.class_name.endswith("." + name):
        return []
    near = near_class(name, [site.class_name])
    if near is None:
        return [Change("class", 4.0, f"is a {site.class_name}", pattern.span)]
    said = f'is a {site.class_name}: class "{near.pattern}" matches it'
    fix = f'write `class "{near.pattern}"`'
    change = Change("class", 0.5 + near.distance, said, pattern.span, fix)
    return [change.edited(name_edits(pattern, near.pattern))]


def _within_changes(
    pattern: SiteMatch, site: Site, places: Places, block_set: Chosen | None
) -> list[Change]:
    """What keeps a site from lying in the roles that the rule wants around it."""
    found: list[Change] = []
    for role in pattern.within:
        above = [s for p in _above(site.path) if (s := places.analysis.by_path.get(p)) is not None]
        reasons = [role_change(role, s, places, pattern.span) for s in above]
        if not above or all(reasons):
            near = min((r for r in reasons if r), key=lambda r: r.cost, default=None)
            holder = next((s.path for s, r in zip(above, reasons, strict=True) if r is near), "")
            why = f": {holder} {near.text}" if near is not None and near.cost < 4 else ""
            cost = near.cost if near is not None else 4.0
            fix = near.fix if near is not None else None
            source = near.source if near is not None else None
            said = f"lies in no {role}{why}"
            change = Change("within", cost, said, pattern.span, fix, source)
            found.append(change.edited(path_edits(pattern, site, places, block_set)))
    return found


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _chain_change(pattern: SiteMatch | GroupMatch, block_set: Chosen) -> list[Change]:
    """What is wrong with the chain that the rule names, or that it names none."""
    if block_set.change is None or pattern.blocks is None:
        return []
    return [block_set.change.edited(chain_edits(pattern.blocks, block_set.chain.name))]


def _block_changes(pattern: SiteMatch, block_set: Chosen, site: Site) -> list[Change]:
    found = _chain_change(pattern, block_set)
    assert pattern.blocks is not None
    if site.block is None:
        said = "lies in no block"
        change = Change("block", 1.5, said, block_set.span, "leave out `in blocks …`")
        return [*found, change.edited(everywhere_edits(pattern))]
    chain, index = site.block
    if chain != block_set.chain.name:
        said = f"lies in the chain `{chain}`, not `{block_set.chain.name}`"
        fix = f'write `blocks of "{chain}" …`'
        # A misspelt chain is judged by the chain that it is near to, not by all the others.
        change = Change("chain", 1.5 if not found else 4.0, said, block_set.span, fix)
        return [*found, change.edited(chain_edits(pattern.blocks, chain))]
    if index not in block_set.inside:
        change = block_set.outside_change(index)
        wider = sorted({*block_set.inside, index})
        found.append(change.edited(blocks_edits(pattern.blocks, wider)))
    return found


def group_misses(rule: Rule, pattern: GroupMatch, places: Places) -> Iterator[Miss]:
    """Groups of blocks that are no neighbours, are left over, or that `where` turns down."""
    size = len(pattern.bindings)
    what = "a pair" if size == 2 else f"a run of {size}"
    for block_set in chosen(pattern.blocks, places.analysis):
        extra = _chain_change(pattern, block_set)
        yield from _beyond(pattern, block_set)
        paths = block_set.chain.paths
        whole = len(block_set.inside) - len(block_set.inside) % size
        for start in range(0, whole, size):
            group = block_set.inside[start : start + size]
            place = " + ".join(paths[i] for i in group)
            gap = next(((a, b) for a, b in pairwise(group) if b != a + 1), None)
            changes = list(extra)
            if gap is not None:
                said = f"blocks {gap[0]} and {gap[1]} are no neighbours: {what} is of blocks that follow each other"
                change = Change("group", 1.0, said, pattern.blocks.span)
                whole_groups = neighbours(block_set.inside, size)
                changes.append(change.edited(blocks_edits(pattern.blocks, whole_groups)))
            sites = _bound(pattern, group, block_set, places)
            changes += guard_changes(rule.where, sites, places.analysis)
            if changes:
                line = places.line(paths[group[0]])
                yield Miss(place, tuple(changes), line)
        for index in block_set.inside[whole:]:
            said = f"left over: {len(block_set.inside)} blocks do not divide into {what.removeprefix('a ')}s"
            fix = f"add `except {{{index}}}`"
            change = Change("group", 1.0, said, pattern.blocks.span, fix)
            change = change.edited(blocks_edits(pattern.blocks, block_set.inside[:whole]))
            yield Miss(paths[index], (*extra, change))


def _bound(
    pattern: GroupMatch, group: tuple[int, ...], block_set: Chosen, places: Places
) -> Mapping[str, Site]:
    by_path = places.analysis.by_path
    return {
        name: by_path[block_set.chain.paths[i]]
        for name, i in zip(pattern.bindings, group, strict=True)
    }
