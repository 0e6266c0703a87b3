"""Matching: which sites of a model a rule selects, which it does not, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graftc.diagnostics import GraftError, Note, Span, fail, nearest
from graftc.language.blocks import select
from graftc.language.evaluate import holds
from graftc.language.rules import (
    Blocks,
    DataflowMatch,
    Fact,
    GroupMatch,
    PythonMatch,
    Rewrite,
    Rule,
    SequenceMatch,
    SiteMatch,
)
from graftc.operators.spec import Value
from graftc.program.analysis import Analysis, Site
from graftc.program.chains import Chain
from graftc.program.flat import Op
from graftc.rewrite.dataflow.occurrence import Occurrence, SiteValue
from graftc.rewrite.dataflow.select import rule_patterns, select_occurrences
from graftc.rewrite.dataflow.view import ProgramView, program_view
from graftc.rewrite.facts import site_fact
from graftc.rewrite.globs import path_matches
from graftc.rewrite.measured import Listing, MeasuredSet, block_values, listings
from graftc.rewrite.sequence import sequences
from graftc.rewrite.user_files import unread


@dataclass(frozen=True, eq=False)
class Match:
    """One place where a rule applies: its names and the sites they are bound to.

    `occurrence`: the ops, values and sites that a dataflow pattern is bound to.
    """

    rule: Rule
    bindings: Mapping[str, Site]
    occurrence: Occurrence | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.bindings.values())


@dataclass(frozen=True)
class Filtered:
    """A place that matched the pattern and that `where` turned down, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Matches:
    """What a rule selects in a model. `measured`: the values that its measured selectors chose by."""

    rule: Rule
    found: tuple[Match, ...]
    filtered: tuple[Filtered, ...]
    measured: tuple[Listing, ...] = ()


def match(rule: Rule, analysis: Analysis, view: ProgramView | None = None) -> Matches:
    """All places of the original Program where `rule` applies.

    Raises GraftError where a block chain is unknown, a selected block has no such site, a group is not
    of neighbours, or `expect` is not met; the near misses are in its notes. `view` is shared by all dataflow
    rules of a plan.
    """
    try:
        return selection(rule, analysis, view)
    except GraftError as error:
        from graftc.rewrite.whynot import with_near_misses

        raise with_near_misses(error, rule, analysis) from None


def selection(rule: Rule, analysis: Analysis, view: ProgramView | None = None) -> Matches:
    """As `match`; what it raises names no near misses."""
    if any(isinstance(m, (DataflowMatch, PythonMatch)) for m in rule.matches):
        made = find_matches(rule, analysis, view or program_view(analysis.flat))
        turned = [Match(rule, {}) for _ in made.filtered]
        _check_expectation(rule, list(made.found), list(made.filtered), [*made.found, *turned])
        return made
    candidates = _candidates(rule, analysis)
    found: list[Match] = []
    turned: list[Match] = []
    filtered: list[Filtered] = []
    for candidate in candidates:
        if rule.where is not None:
            verdict = holds(rule.where, lambda fact, c=candidate: _fact(fact, c, analysis))
            if not verdict.ok:
                turned.append(candidate)
                filtered.append(
                    Filtered(" + ".join(s.path for s in candidate.sites), verdict.reason)
                )
                continue
        found.append(candidate)
    _check_expectation(rule, found, filtered, candidates)
    return Matches(rule, tuple(found), tuple(filtered), _listings(rule, analysis, found, turned))


def find_matches(rule: Rule, analysis: Analysis, view: ProgramView) -> Matches:
    """The matches of a rule with a dataflow pattern, be there any or none; names may be bound to sites too."""
    for pattern in rule.matches:
        if isinstance(pattern, PythonMatch):
            unread(pattern, pattern.span)
    patterns = rule_patterns(rule)
    clauses = [m for m in rule.matches if isinstance(m, SiteMatch)]
    sites = {c.binding: site_calls(c, analysis) for c in clauses}
    found, turned = select_occurrences(rule, patterns, view, sites)
    matches = [Match(rule, o.sites, o) for o in found]
    if not isinstance(
        rule.edit, Rewrite
    ):  # one edit for each site, however often the pattern is there
        once = {tuple(s.path for s in m.sites): m for m in reversed(matches)}
        matches = list(reversed(once.values()))
    filtered = [Filtered(t.path, t.reason) for t in turned]
    if not isinstance(rule.expect, int):
        for clause in clauses:
            _check_every_site(rule, clause, sites[clause.binding], matches, filtered)
    measured = _listings(rule, analysis, matches, [])
    return Matches(rule, tuple(matches), tuple(filtered), measured)


def _listings(
    rule: Rule, analysis: Analysis, found: list[Match], turned: list[Match]
) -> tuple[Listing, ...]:
    """The values that measured selectors chose by, if the rule has any."""
    if analysis.measured is None:
        return ()
    sets: list[MeasuredSet] = []
    for pattern in rule.matches:
        blocks = getattr(pattern, "blocks", None)
        if isinstance(blocks, Blocks) and blocks.kind == "measured":
            own = pool(pattern, analysis) if isinstance(pattern, SiteMatch) else ()
            chain, indices = selected_blocks(blocks, analysis, own)
            values = block_values(blocks, chain, analysis, own)
            if values is not None:
                sets.append(MeasuredSet(blocks, chain, indices, values))
    return listings(rule, sets, [m.bindings for m in found], [m.bindings for m in turned])


def site_calls(clause: SiteMatch, analysis: Analysis) -> dict[Op, SiteValue]:
    """The sites that a clause beside a dataflow pattern selects, by the results of their calls."""
    return _calls(_sites(clause, analysis), analysis)


def _calls(sites: list[Site], analysis: Analysis) -> dict[Op, SiteValue]:
    """The results of sites' calls, with what they are given: the token stream first."""
    found: dict[Op, SiteValue] = {}
    for site in sites:
        call = analysis.flat.first_calls[site.path]
        if isinstance(call.result, Op):
            others = [a for i, a in enumerate(call.args) if i != site.stream]
            found[call.result] = SiteValue((call.args[site.stream], *others), site)
    return found


def _check_every_site(
    rule: Rule,
    clause: SiteMatch,
    sites: Mapping[Op, SiteValue],
    matches: list[Match],
    filtered: list[Filtered],
) -> None:
    """A selected site without the pattern is an error, as a selected block without the site is."""
    if clause.blocks is None:
        return
    matched = {m.bindings[clause.binding].path for m in matches if clause.binding in m.bindings}
    missing = [v.site.path for v in sites.values() if v.site.path not in matched]
    judged = [p for p in missing if any(p in f.path for f in filtered)]
    missing = [p for p in missing if p not in judged]
    if missing:
        fail(
            "G381",
            f"the pattern of rule `{rule.name}` is not at {missing[0]}",
            span=clause.span,
            site=missing[0],
            notes=[Note(f"nor at {p}") for p in missing[1:6]],
            help="narrow the block set, or say how many matches there are: `expect N`",
        )


def _candidates(rule: Rule, analysis: Analysis) -> list[Match]:
    (pattern,) = rule.matches
    if isinstance(pattern, GroupMatch):
        chain, indices = selected_blocks(pattern.blocks, analysis)
        return [
            Match(rule, dict(zip(pattern.bindings, group, strict=True)))
            for group in _groups(pattern, chain, indices, analysis)
        ]
    if isinstance(pattern, SequenceMatch):
        return [
            Match(rule, dict(zip(pattern.bindings, row, strict=True)))
            for row in sequences(pattern, _sites_by_block, analysis)
        ]
    assert isinstance(pattern, SiteMatch)
    return [Match(rule, {pattern.binding: site}) for site in _sites(pattern, analysis)]


def pool(pattern: SiteMatch, analysis: Analysis) -> list[Site]:
    """The sites of a pattern in any block."""
    candidates = list(_of_kind(pattern, analysis))
    for role in pattern.within:
        holders = {s.path for s in analysis.of_role(role)}
        candidates = [s for s in candidates if not holders.isdisjoint(_above(s.path))]
    return candidates


def _sites_by_block(pattern: SiteMatch, analysis: Analysis) -> list[Site]:
    """As `_sites`, for one of several roles: a measured set ranks blocks, so that all mean the same ones."""
    return _sites(pattern, analysis, ranked=())


def _sites(
    pattern: SiteMatch, analysis: Analysis, ranked: Iterable[Site] | None = None
) -> list[Site]:
    candidates = pool(pattern, analysis)
    if pattern.blocks is None:
        if not candidates:
            _nothing(pattern, analysis)
        return candidates
    chain, indices = selected_blocks(
        pattern.blocks, analysis, candidates if ranked is None else ranked
    )
    by_block: dict[tuple[str, int], list[Site]] = {}
    for site in candidates:
        if site.block is not None:
            by_block.setdefault(site.block, []).append(site)
    chosen: list[Site] = []
    for index in indices:
        inside = by_block.get((chain.name, index), [])
        if not inside:
            _nothing(pattern, analysis, chain, index)
        chosen += inside
    return chosen


def _above(path: str) -> Iterable[str]:
    """The paths of the modules that hold a module."""
    while path := path.rpartition(".")[0]:
        yield path


def _of_kind(pattern: SiteMatch, analysis: Analysis) -> Iterable[Site]:
    if pattern.role is not None:
        return analysis.of_role(pattern.role)
    if pattern.path is not None:
        return (s for s in analysis.sites if path_matches(pattern.path or "", s.path))
    name = pattern.class_name or ""
    return (s for s in analysis.sites if s.class_name == name or s.class_name.endswith("." + name))


def _nothing(
    pattern: SiteMatch, analysis: Analysis, chain: Chain | None = None, index: int | None = None
) -> None:
    what = pattern.role or (
        f'module "{pattern.path}"' if pattern.path else f'class "{pattern.class_name}"'
    )
    where = f" in block {index} of `{chain.name}`" if chain is not None else " in the model"
    notes: list[Note] = []
    help_: str | None = None
    if chain is not None and index is not None:
        roles = [
            s
            for s in analysis.sites
            if s.block == (chain.name, index) and s.role not in ("unknown", "block")
        ]
        notes = [Note(f"{s.path} is {s.role}") for s in roles if s.role not in ("linear", "norm")][
            :6
        ]
    elif pattern.path:
        near = nearest(pattern.path.replace("*", "0"), [s.path for s in analysis.sites])
        help_ = f'a near path is "{near}"' if near else "`graftc inspect` lists the paths"
    elif pattern.class_name:
        near = nearest(
            pattern.class_name, {s.class_name.rpartition(".")[2] for s in analysis.sites}
        )
        help_ = f'write class "{near}"' if near else "`graftc inspect` lists the classes"
    else:
        present = sorted({s.role for s in analysis.sites} - {"unknown"})
        notes = [Note("roles in this model: " + ", ".join(present))]
    fail(
        "G310",
        f"no {what}{where}",
        span=pattern.span,
        site=chain.paths[index] if chain is not None and index is not None else None,
        notes=notes,
        help=help_
        or (
            "narrow the block set, or match another role; a place without the pattern is never skipped in silence"
        ),
    )


def selected_blocks(
    blocks: Blocks, analysis: Analysis, sites: Iterable[Site] = ()
) -> tuple[Chain, tuple[int, ...]]:
    """The chain and the blocks that a set means; a measured one ranks blocks by `sites` in them."""
    chain = find_chain(blocks.chain, blocks.chain_span or blocks.span, analysis)
    values = block_values(blocks, chain, analysis, sites)
    return chain, select(blocks, len(chain), chain.name, values)


def find_chain(name: str | None, span: Span | None, analysis: Analysis) -> Chain:
    """The chain called `name`, or the only one."""
    names = [c.name for c in analysis.chains]
    if not names:
        fail(
            "G311",
            "the model has no chain of blocks",
            span=span,
            help='name the module by path: match a = module "…"',
        )
    if name is None:
        if len(names) > 1:
            fail(
                "G312",
                "the model has several chains of blocks",
                span=span,
                wanted="which one",
                found=", ".join(f'"{n}"' for n in names),
                help=f'write `blocks of "{names[0]}" …`',
            )
        return analysis.chains[0]
    for chain in analysis.chains:
        if chain.name == name:
            return chain
    near = nearest(name, names)
    fail(
        "G313",
        f'the model has no chain of blocks "{name}"',
        span=span,
        wanted=", ".join(f'"{n}"' for n in names),
        found=f'"{name}"',
        help=f'write `blocks of "{near or names[0]}" …`',
    )


def _groups(
    pattern: GroupMatch, chain: Chain, indices: tuple[int, ...], analysis: Analysis
) -> list[tuple[Site, ...]]:
    size = len(pattern.bindings)
    what = "pairs" if size == 2 else f"runs of {size}"
    if len(indices) % size:
        fail(
            "G314",
            f"{len(indices)} blocks do not divide into {what}",
            span=pattern.blocks.span,
            wanted=f"a multiple of {size}",
            found=f"{len(indices)} blocks of `{chain.name}`",
            help=f"leave out {len(indices) % size} with `except {{{indices[-1]}}}`",
        )
    groups: list[tuple[Site, ...]] = []
    for start in range(0, len(indices), size):
        group = indices[start : start + size]
        for before, after in itertools.pairwise(group):
            if after != before + 1:
                fail(
                    "G315",
                    f"blocks {before} and {after} of `{chain.name}` are no neighbours",
                    span=pattern.blocks.span,
                    wanted=f"{what} of blocks that follow each other",
                    found=", ".join(map(str, group)),
                )
        groups.append(tuple(_block_site(chain, i, analysis) for i in group))
    return groups


def _block_site(chain: Chain, index: int, analysis: Analysis) -> Site:
    return analysis.by_path[chain.paths[index]]


def _fact(fact: Fact, candidate: Match, analysis: Analysis) -> Value:
    from graftc.rewrite.block_parts import inner_site  # which needs Match

    binding, _, part = fact.binding.partition(".")
    site = candidate.bindings.get(binding)
    if site is None:
        fail(
            "G320",
            f"`{fact.binding}` is not bound",
            span=fact.span,
            wanted=", ".join(candidate.bindings),
            found=fact.binding,
        )
    inner = inner_site(analysis, site, part, fact.span) if part else site
    return site_fact(inner, fact)


def _check_expectation(
    rule: Rule, found: list[Match], filtered: list[Filtered], candidates: list[Match]
) -> None:
    notes = [Note(f"near miss at {f.path}: {f.reason}") for f in filtered[:6]]
    if len(filtered) > 6:
        notes.append(Note(f"… and {len(filtered) - 6} more"))
    span = rule.expect_span or rule.span
    if rule.expect == "all" and filtered:
        fail(
            "G331",
            f"rule `{rule.name}` matched {len(found)} of {len(candidates)} places",
            span=span,
            label="expected all",
            notes=notes,
            help=f"write `expect {len(found)}`, or loosen `where`",
        )
    if isinstance(rule.expect, int) and rule.expect != len(found):
        fail(
            "G331",
            f"rule `{rule.name}` matched {len(found)} places, expected {rule.expect}",
            span=span,
            label="expected here",
            notes=notes,
            help=f"write `expect {len(found)}`, or change the block set or `where`",
        )
    if not found:
        fail(
            "G332",
            f"rule `{rule.name}` matched nothing",
            span=span,
            notes=notes,
            help="loosen `where`" if filtered else None,
        )
