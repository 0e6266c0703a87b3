"""Measured selectors: what a file asks to be measured, the values of blocks, and the values beside what was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftc.diagnostics import Span, fail
from graftc.language.evaluate import shown
from graftc.language.rules import Blocks, Fact, Rule, Rules
from graftc.program.analysis import Analysis, Site
from graftc.program.chains import Chain
from graftc.program.measured import FAMILY
from graftc.rewrite.facts import measure_of


def measured_facts(value: Any) -> Iterator[Fact]:
    """Every measured fact in a rule, wherever it stands: in guards, block sets, arguments, sources of weights."""
    if isinstance(value, Span):
        return
    if isinstance(value, Fact) and value.name in FAMILY:
        yield value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from measured_facts(getattr(value, f.name))
    elif isinstance(value, (tuple, list)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from measured_facts(item)
    elif isinstance(value, Mapping):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from measured_facts(item)


def families(rules: Rules) -> tuple[str, ...]:
    """What has to be measured for a file's rules: families of `program.measured.FAMILY`, in its order.

    Raises GraftError for a rule with `repeat` (G490): it runs on what the other rules made, which nothing measured.
    """
    asked: set[str] = set()
    for rule in rules.rules:
        facts = list(measured_facts(rule))
        if facts and rule.repeat is not None:
            fail(
                "G490",
                f"rule `{rule.name}` repeats, and `{facts[0].name}` is measured on the model as it was",
                span=facts[0].span,
                help="leave out `repeat`, or choose by a fact that is not measured",
            )
        asked |= {FAMILY[f.name] for f in facts}
    return tuple(f for f in dict.fromkeys(FAMILY.values()) if f in asked)


def block_values(
    blocks: Blocks, chain: Chain, analysis: Analysis, sites: Iterable[Site] = ()
) -> list[float] | None:
    """The measure of each block of a chain, for a measured set; None for another set, or where nothing was measured.

    It is that of the clause's own site in the block where it has one (`a = mlp in blocks top 4 by kurtosis`), else the
    block's: its influence or its output's statistics; its attention's locality. Of several sites it is the mean.
    """
    measure = blocks.measure
    if blocks.kind != "measured" or measure is None or analysis.measured is None:
        return None
    own = _by_block(sites)
    local = _by_block(s for r in ("self_attention", "joint_attention") for s in analysis.of_role(r))
    values: list[float] = []
    for index, path in enumerate(chain.paths):
        block = analysis.by_path[path]
        place = (chain.name, index)
        inner = own.get(place, [])
        have = [s for s in inner if _has(s, measure)]
        if not have:
            have = local.get(place, []) if measure.name == "locality" else [block]
        found = [measure_of(s, measure) for s in have or [block]]
        values.append(sum(found) / len(found))
    return values


def _by_block(sites: Iterable[Site]) -> dict[tuple[str, int], list[Site]]:
    found: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        if site.block is not None:
            found.setdefault(site.block, []).append(site)
    return found


def _has(site: Site, fact: Fact) -> bool:
    band = fact.options.get("band")
    measures = site.measured
    if measures is None:
        return False
    return measures.value(fact.name, band if isinstance(band, int) else None) is not None


@dataclass(frozen=True)
class Listing:
    """The values of one measured selector: what was chosen, and what was not.

    `selector` is as it is written: `bottom 6 by influence`, `locality(a, band = 32)`. An entry is (path, value).
    """

    selector: str
    chosen: tuple[tuple[str, float], ...]
    others: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class MeasuredSet:
    """A measured block set, the blocks that it means, and the value of every block of the chain."""

    blocks: Blocks
    chain: Chain
    indices: tuple[int, ...]
    values: list[float]


def listings(
    rule: Rule,
    sets: Iterable[MeasuredSet],
    found: Iterable[Mapping[str, Site]],
    turned: Iterable[Mapping[str, Site]],
) -> tuple[Listing, ...]:
    """One listing for each measured block set, and for each measured fact of `where`."""
    made: list[Listing] = []
    for one in sets:
        pairs = list(enumerate(zip(one.chain.paths, one.values, strict=True)))
        made.append(
            Listing(
                " ".join(one.blocks.span.text.split()),
                tuple(p for i, p in pairs if i in one.indices),
                tuple(p for i, p in pairs if i not in one.indices),
            )
        )
    kept, left = list(found), list(turned)
    seen: set[str] = set()
    for fact in measured_facts(rule.where):
        text = shown(fact)
        if text not in seen:
            seen.add(text)
            made.append(Listing(text, _values(fact, kept), _values(fact, left)))
    return tuple(made)


def _values(fact: Fact, places: list[Mapping[str, Site]]) -> tuple[tuple[str, float], ...]:
    """The values at each place that has one: a guard may have been decided before it was read."""
    sites = [p[fact.binding] for p in places if fact.binding in p]
    return tuple((s.path, measure_of(s, fact)) for s in dict.fromkeys(sites) if _has(s, fact))
