"""Rules that cannot live together: one repeats another, or takes sites that another takes already.

Told from the text alone, so only what holds for every model: where a guard or a measure decides, `plan` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from graftc.diagnostics import Diagnostic, GraftError, Note, Span
from graftc.language.blocks import select
from graftc.language.rules import (
    Blocks,
    DataflowMatch,
    Edit,
    GroupMatch,
    KindGuard,
    OneOf,
    Parallel,
    Ref,
    Remove,
    Replace,
    Rewrite,
    Rule,
    ShapeDim,
    ShapeGuard,
    SiteMatch,
    Skip,
    SpreadTerm,
)
from graftc.language.vocabulary import covers

_LENGTHS = (2, 3, 6, 8, 12, 16, 24, 28, 32, 40, 48, 64, 96)
_TAKES = (Replace, Remove, Skip)
_EVERY = ("*", "**", "**.*", "*.**")


def conflicts(rules: Sequence[Rule]) -> Iterator[Diagnostic]:
    """An error for each rule that repeats another or shares its sites; a warning for a glob of all modules."""
    for rule in rules:
        yield from _too_wide(rule)
    told: set[str] = set()
    known: _Known = {}
    for at, earlier in _meetings(rules):
        second = rules[at]
        if second.name in told:
            continue
        for one in earlier:
            how = _shared(rules[one], second, known)
            if how is not None:
                told.add(second.name)
                yield _diagnostic(rules[one], second, how)
                break


Sharing = Literal["same", "part", "some"]
_Known = dict[tuple[Any, Any], "Sharing | None"]
"""What pairs of block sets share: most files say the same few sets over and over."""

_MOST_NAMED = 64
"""A set of more blocks is compared with every other."""


def _meetings(rules: Sequence[Rule]) -> Iterator[tuple[int, Sequence[int]]]:
    """Each rule with those before it that may share something, by their places in the file, in its order.

    Rules that name their blocks one by one meet only where they name the same; all others meet each other.
    """
    by_block: dict[int, list[int]] = {}
    others: list[int] = []
    seen: list[int] = []
    by_text: dict[Any, int] = {}
    guarded: dict[Any, int] = {}
    for at, rule in enumerate(rules):
        if rule.where is not None or rule.guards or len(rule.matches) != 1:
            # where a guard decides, `plan` tells; but the same words take the same places
            first = guarded.setdefault(_plain((rule.matches, rule.where, rule.guards)), at)
            if first != at:
                yield at, (first,)
            continue
        match = rule.matches[0]
        if isinstance(match, DataflowMatch):
            first = by_text.setdefault(_plain(match.statements), at)
            if first != at:
                yield at, (first,)
            continue
        blocks = match.blocks if isinstance(match, (SiteMatch, GroupMatch)) else None
        named = _named(blocks)
        if named is None:
            meets = seen
            others.append(at)
        else:
            meets = sorted({*others, *(i for n in named for i in by_block.get(n, ()))})
            for n in named:
                by_block.setdefault(n, []).append(at)
        yield at, meets
        seen.append(at)


def _named(blocks: Blocks | None) -> set[int] | None:
    """The blocks of a set that says them one by one; None for any other, and for a large one."""
    if blocks is None or blocks.kind != "ranges":
        return None
    if sum((r.last - r.first) // max(1, r.step) + 1 for r in blocks.ranges) > _MOST_NAMED:
        return None
    return {i for r in blocks.ranges for i in range(r.first, r.last + 1, max(1, r.step))}


def _diagnostic(first: Rule, second: Rule, how: Sharing) -> Diagnostic:
    notes = (Note(f"rule `{first.name}` is here", first.span),)
    if how == "same" and _plain(first.edit) == _plain(second.edit):
        return Diagnostic(
            "G410",
            f"rule `{second.name}` repeats rule `{first.name}`",
            span=second.span,
            notes=notes,
            help="leave one of them out",
        )
    what = {
        "same": f"takes the same places as rule `{first.name}`",
        "part": f"takes places that are all rule `{first.name}`'s already",
        "some": f"takes some of the places that rule `{first.name}` takes",
    }[how]
    return Diagnostic(
        "G411",
        f"rule `{second.name}` {what}",
        span=second.span,
        wanted="one edit of a place",
        notes=notes,
        help="narrow one of the two, for example with `except {…}`",
    )


def _shared(first: Rule, second: Rule, known: _Known) -> Sharing | None:
    """What places two rules share in every model, None where that cannot be told or is nothing."""
    if first.where is not None or first.guards or len(first.matches) != 1:
        return "same" if _takes(first.edit) and _takes(second.edit) else None  # the same words
    one, other = first.matches[0], second.matches[0]
    if isinstance(one, DataflowMatch) and isinstance(other, DataflowMatch):
        both = isinstance(first.edit, Rewrite) and isinstance(second.edit, Rewrite)
        return "same" if both else None  # their texts are the same, or they would be no pair
    if isinstance(one, GroupMatch) and isinstance(other, GroupMatch):
        both = isinstance(first.edit, Parallel) and isinstance(second.edit, Parallel)
        return _of_blocks(one.blocks, other.blocks, known) if both else None
    if not isinstance(one, SiteMatch) or not isinstance(other, SiteMatch):
        return None
    if not isinstance(first.edit, _TAKES) or not isinstance(second.edit, _TAKES):
        return None
    return _of_sites(one, other, known)


def _takes(edit: Edit) -> bool:
    """Whether an edit takes its places for itself; an `insert` leaves them to others."""
    return isinstance(edit, (*_TAKES, OneOf, Parallel, Rewrite))


def _of_sites(one: SiteMatch, other: SiteMatch, known: _Known) -> Sharing | None:
    if one.path is not None or other.path is not None or one.class_name or other.class_name:
        kind = (one.path, one.class_name) == (other.path, other.class_name)
        return (
            _of_blocks(one.blocks, other.blocks, known)
            if kind and one.within == other.within
            else None
        )
    assert one.role is not None
    assert other.role is not None
    if one.within != other.within:
        return None
    blocks = _of_blocks(one.blocks, other.blocks, known)
    if one.role == other.role:
        return blocks
    if "block" in (one.role, other.role):  # a site of a block that goes, or is replaced
        inner = other if one.role == "block" else one
        return "some" if blocks and inner.blocks is not None else None
    if covers(one.role, other.role):
        return "part" if blocks in ("same", "part") else blocks
    return "some" if blocks and covers(other.role, one.role) else None


def _of_blocks(one: Blocks | None, other: Blocks | None, known: _Known) -> Sharing | None:
    """What two block sets share, whatever the chain's length."""
    if one is None or other is None:
        return "same" if one is other else "part" if one is None else "some"
    if one.chain != other.chain:
        return None
    key = (_plain(one), _plain(other))
    if key not in known:
        known[key] = _of_chains(one, other)
    return known[key]


def _of_chains(one: Blocks, other: Blocks) -> Sharing | None:
    found: set[Sharing | None] = set()
    needed = max((r.last for b in (one, other) for r in (*b.ranges, *b.excluded)), default=0) + 1
    for length in {*(n for n in _LENGTHS if n >= needed), needed, needed + 1}:
        try:
            a, b = (set(select(s, length, "")) for s in (one, other))
        except GraftError:
            continue
        found.add("same" if a == b else "part" if b < a else "some" if a & b else None)
    if not found or None in found:
        return None
    return found.pop() if len(found) == 1 else "some"


_NAMES: dict[type, tuple[str, ...]] = {
    KindGuard: ("name",),
    ShapeGuard: ("name",),
    ShapeDim: ("names",),
}
"""Fields that hold names of the file's writer; of other types those called `binding` and `bindings`."""


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, tuple):
        given: tuple[Any, ...] = value
        return tuple(_renamed(v, names) for v in given)
    return names.setdefault(str(value), str(len(names)))


def _plain(value: Any, names: dict[str, str] | None = None) -> Any:
    """A value without its places in the text, its names numbered in the order that they come."""
    names = {} if names is None else names
    if isinstance(value, Span):
        return None
    if isinstance(value, (Ref, SpreadTerm)):
        return type(value).__name__, names.setdefault(value.name, str(len(names)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        renamed = _NAMES.get(type(value), ("binding", "bindings"))
        fields = [
            _renamed(x, names) if f.name in renamed else _plain(x, names)
            for f in dataclasses.fields(value)
            if not isinstance(x := getattr(value, f.name), Span)
        ]
        return type(value).__name__, tuple(fields)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v, names) for v in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        pairs = ((str(k), _plain(v, names)) for k, v in value.items())  # pyright: ignore[reportUnknownVariableType]
        return tuple(sorted(pairs, key=lambda p: p[0]))
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def _too_wide(rule: Rule) -> Iterator[Diagnostic]:
    for match in rule.matches:
        if isinstance(match, SiteMatch) and match.path in _EVERY and match.blocks is None:
            yield Diagnostic(
                "G416",
                f'`module "{match.path}"` is every module'
                + (" of the outermost level" if match.path == "*" else ""),
                span=match.span,
                wanted='the modules that are meant, such as `module "blocks.*.mlp"`',
                help="name the modules, or a role",
                severity="warning",
            )
