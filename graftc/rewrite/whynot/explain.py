"""`graftc explain`: what each rule selects in a model, and for the places that it nearly does, what is between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftc.diagnostics import (
    Diagnostic,
    GraftError,
    Note,
    TextEdit,
    edits_json,
    fail,
    nearest,
    to_json,
)
from graftc.language.rules import (
    DataflowMatch,
    GroupMatch,
    Rule,
    Rules,
    SequenceMatch,
    SiteMatch,
)
from graftc.program.analysis import Analysis
from graftc.program.flat import Op
from graftc.rewrite.dataflow.occurrence import Sites, SiteValue
from graftc.rewrite.dataflow.own_side import own_side
from graftc.rewrite.dataflow.select import place
from graftc.rewrite.whynot.change import Change, Miss, ranked
from graftc.rewrite.whynot.dataflow import dataflow_misses
from graftc.rewrite.whynot.places import Places
from graftc.rewrite.whynot.sites import group_misses, pattern_sets, site_miss, site_misses

if TYPE_CHECKING:
    from graftc.rewrite.match import Match

_MOST_NOTES = 6
_NOT_MET = ("G310", "G331", "G332", "G381")
"""A block without the site, `expect` not met, nothing matched: near misses belong to these."""


@dataclass(frozen=True)
class Explanation:
    """What one rule does in a model.

    `selected`: the places, a group's joined by ` + `. `misses`: near misses, the nearest first. `problems`: why
    `plan` would refuse the rule, and what it says of a pattern that can never match its own ops.
    """

    rule: Rule
    selected: tuple[str, ...]
    misses: tuple[Miss, ...]
    problems: tuple[Diagnostic, ...] = ()

    @property
    def help(self) -> str | None:
        """The one edit of the rule that the nearest miss suggests; None where the rule does what it says."""
        refused = any(p.severity == "error" for p in self.problems)
        if not self.misses or (self.selected and not refused):
            return None
        return self.misses[0].help

    @property
    def edits(self) -> tuple[TextEdit, ...]:
        """The same edit as data; empty where the text alone cannot help."""
        return self.misses[0].edits if self.help else ()


def explain(
    rules: Rules, analysis: Analysis, name: str | None = None, at: str | None = None
) -> tuple[Explanation, ...]:
    """For every rule (or the one called `name`): what it selects, and the near misses.

    `at`: only the place with this path, however far it is. Raises GraftError where there is no such rule or path.
    """
    chosen = [r for r in rules.rules if name is None or r.name == name]
    if not chosen:
        known = [r.name for r in rules.rules]
        near = nearest(name or "", known)
        fail(
            "G418",
            f"the file has no rule `{name}`",
            site=rules.files[0] if rules.files else None,
            wanted=", ".join(known) or "a rule",
            found=str(name),
            help=f"write `{near}`" if near else None,
        )
    if at is not None and at not in analysis.by_path:
        near = nearest(at, analysis.by_path)
        fail(
            "G419",
            f'the model has no module "{at}" that is called',
            site="--at",
            help=f'a near path is "{near}"' if near else "`graftc inspect` lists the paths",
        )
    places = Places(analysis)
    return tuple(_explained(rule, places, at) for rule in chosen)


def _explained(rule: Rule, places: Places, at: str | None) -> Explanation:
    from graftc.rewrite.match import selection

    selected: tuple[str, ...] = ()
    own = tuple(own_side(rule))
    if any(d.severity == "error" for d in own):  # no edit for a model helps such a rule
        return Explanation(rule, (), (), own)
    problems: tuple[Diagnostic, ...] = ()
    try:
        found = selection(rule, places.analysis)
        selected = tuple(_place(m) for m in found.found)
    except GraftError as error:
        problems = tuple(
            replace(d, notes=(), help=None, edits=()) if d.code in _NOT_MET else d
            for d in error.diagnostics
        )
    if at is None:
        return Explanation(rule, selected, near_misses(rule, places), (*problems, *own))
    here = tuple(s for s in selected if at in s.split(" + ") or _is_in(s, at))
    return Explanation(
        rule, here, () if here else tuple(_misses_at(rule, places, at)), (*problems, *own)
    )


def _place(match: Match) -> str:
    """A match's place, as its user knows it: the paths of sites, or where a pattern's ops are."""
    if match.occurrence is not None:
        return place(match.occurrence)
    return " + ".join(s.path for s in match.sites)


def _is_in(place: str, at: str) -> bool:
    """Whether ops at `blocks.0.attn: o` are in a module."""
    return f"{place}.".startswith((f"{at}.", f"{at}:"))


def near_misses(rule: Rule, places: Places) -> tuple[Miss, ...]:
    """The near misses of a rule, the nearest first; places that need the same are told once."""
    return ranked(_misses(rule, places))


def _misses(rule: Rule, places: Places) -> Iterator[Miss]:
    if any(isinstance(p, DataflowMatch) for p in rule.matches):
        sites, missing = _bound_sites(rule, places)
        yield from missing
        yield from dataflow_misses(rule, places.view, sites)
        return
    for pattern in rule.matches:
        if isinstance(pattern, GroupMatch):
            yield from group_misses(rule, pattern, places)
        elif isinstance(pattern, SiteMatch):
            yield from site_misses(rule, pattern, places, ())
        elif isinstance(pattern, SequenceMatch):
            alone = replace(rule, where=None)  # a guard is on sites that follow each other
            for one in _members(pattern):
                yield from site_misses(alone, one, places, ())


def _bound_sites(rule: Rule, places: Places) -> tuple[Sites, list[Miss]]:
    """The sites that a dataflow rule names beside its ops, and the near misses where there are none."""
    from graftc.rewrite.match import site_calls

    found: dict[str, Mapping[Op, SiteValue]] = {}
    missing: list[Miss] = []
    for clause in (m for m in rule.matches if isinstance(m, SiteMatch)):
        try:
            found[clause.binding] = site_calls(clause, places.analysis)
        except GraftError:
            alone = replace(rule, where=None)
            missing += site_misses(alone, clause, places, ())
    return found, missing


def _members(pattern: SequenceMatch) -> Iterator[SiteMatch]:
    """The sites of a sequence, each as a pattern of its own."""
    for name, role in zip(pattern.bindings, pattern.roles, strict=True):
        yield SiteMatch(name, pattern.span, role=role, within=pattern.within, blocks=pattern.blocks)


def _misses_at(rule: Rule, places: Places, at: str) -> Iterator[Miss]:
    """The whole script for one place, however long."""
    site = places.analysis.by_path[at]
    if any(isinstance(p, DataflowMatch) for p in rule.matches):
        found = dataflow_misses(rule, places.view, _bound_sites(rule, places)[0])
        yield from (m for m in found if _is_in(m.place, at))
        return
    for pattern in rule.matches:
        if isinstance(pattern, GroupMatch):
            yield from (
                m for m in group_misses(rule, pattern, places) if at in m.place.split(" + ")
            )
        elif isinstance(pattern, SiteMatch):
            sets = pattern_sets(pattern, places)
            here = (site_miss(rule, pattern, site, places, s) for s in sets)
            yield from sorted((m for m in here if m is not None), key=lambda m: m.cost)[:1]


def with_near_misses(error: GraftError, rule: Rule, analysis: Analysis) -> GraftError:
    """The same error with the near misses as notes, where it says that a rule matches too little."""
    if not any(d.code in _NOT_MET for d in error.diagnostics):
        return error
    misses = near_misses(rule, Places(analysis))
    return GraftError(*(_noted(d, misses) if d.code in _NOT_MET else d for d in error.diagnostics))


def _noted(diagnostic: Diagnostic, misses: tuple[Miss, ...]) -> Diagnostic:
    if not misses:
        return diagnostic
    notes = [m.note() for m in misses[:_MOST_NOTES]]
    if len(misses) > _MOST_NOTES:
        notes.append(Note(f"… and {len(misses) - _MOST_NOTES} more: `graftc explain` lists them"))
    fix = misses[0].help
    own = diagnostic.help or ""
    expected = own.partition(", or ")[0] if own.startswith("write `expect") else ""
    help_ = (f"{expected}, or {fix}" if expected else fix) if fix else diagnostic.help
    return replace(diagnostic, notes=tuple(notes), help=help_, edits=misses[0].edits)


def explanations_dict(found: tuple[Explanation, ...]) -> dict[str, Any]:
    """Explanations as plain data, for `--format json`."""
    return {"rules": [_dict(e) for e in found]}


def _dict(e: Explanation) -> dict[str, Any]:
    return {
        "rule": e.rule.name,
        "selected": list(e.selected),
        "misses": [
            {
                "place": m.place,
                "cost": round(m.cost, 3),
                "source": m.source,
                "alike": m.alike,
                "changes": [_change_dict(c) for c in m.changes],
                "help": m.help,
                "edits": edits_json(m.edits),
            }
            for m in e.misses
        ],
        "help": e.help,
        "edits": edits_json(e.edits),
        "problems": [to_json(d) for d in e.problems],
    }


def _change_dict(c: Change) -> dict[str, Any]:
    span = None
    if c.span is not None:
        span = {"file": c.span.source.name, "line": c.span.line, "column": c.span.column}
    return {"kind": c.kind, "cost": round(c.cost, 3), "text": c.text, "span": span, "fix": c.fix}
