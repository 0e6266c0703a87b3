"""Which source fills which slot: a rule's `init` clause over the spec's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Union

from graftc.diagnostics import Span, fail, nearest
from graftc.operators.spec import (
    WHOLE,
    Apply,
    Arguments,
    InitSource,
    OperatorSpec,
    Slot,
    holds,
)
from graftc.weights.sources import Context, unfold

Clauses = Iterable[tuple[Union[str, None], InitSource]]
"""A rule's `init` clause: (slot, source); the slot is None where the source fills all of them."""


@dataclass(frozen=True)
class Assignment:
    """One source for one slot; `whole` where it fills all the operator's slots together."""

    slot: Slot
    source: InitSource
    whole: bool
    span: Span | None


def assign(
    spec: OperatorSpec,
    role: str,
    clauses: Clauses,
    context: Context,
    spans: Mapping[str | None, Span],
) -> list[Assignment]:
    """The sources in the order that they are written: whole, then slots, then rows of slots."""
    slots = present(spec, context.arguments)
    by_name = {s.name: s for s in slots}
    overrides = {WHOLE if slot is None else slot: source for slot, source in clauses}
    for name in overrides:
        if name != WHOLE and name not in by_name:
            _unknown_slot(spec, name, tuple(by_name), context, spans.get(name))
    defaults = spec.inits.get(role, {})
    plan: list[Assignment] = []
    for sources, given in ((defaults, False), (overrides, True)):
        if not given and WHOLE in overrides:
            continue
        for name, source in sources.items():
            source = unfold(source, context.arguments)
            span = spans.get(None if name == WHOLE else name) if given else None
            if name == WHOLE:
                plan += [Assignment(s, source, True, span) for s in bodies(slots)]
                continue
            if name not in by_name:
                continue  # a default of a slot that these arguments leave out
            slot = by_name[name]
            if isinstance(source, Apply) and source.policy == "least_squares":
                source = _fitted(slot, source, defaults, by_name, replace(context, span=span))
            plan.append(Assignment(slot, source, False, span))
    # What a later source covers entirely is not computed at all.
    kept = [
        item
        for i, item in enumerate(plan)
        if not any(_covers(later.slot, item.slot) for later in plan[i + 1 :])
    ]
    return sorted(kept, key=lambda a: a.slot.rows is not None)


def present(spec: OperatorSpec, arguments: Arguments) -> list[Slot]:
    """The slots that the operator has with these arguments."""
    return [s for s in spec.slots if holds(s.when, arguments)]


def bodies(slots: list[Slot]) -> list[Slot]:
    """One slot for each submodule: no rows, no second name."""
    found: dict[tuple[str, str | None], Slot] = {}
    for slot in slots:
        if slot.rows is None:
            found.setdefault((slot.module, slot.parameter), slot)
    return list(found.values())


def _covers(later: Slot, earlier: Slot) -> bool:
    same = (later.module, later.parameter) == (earlier.module, earlier.parameter)
    return same and later.rows in (None, earlier.rows)


def _fitted(
    slot: Slot,
    source: Apply,
    defaults: Mapping[str, InitSource],
    by_name: Mapping[str, Slot],
    context: Context,
) -> Apply:
    """Least squares with a start: its own, else the default's for the same submodule, else zero."""
    if not slot.last:
        fail(
            "G406",
            f"least squares fits the last map of an operator; `{slot.name}` of"
            f" `{context.operator}` is not its last",
            span=context.span,
            site=context.path,
        )
    if "otherwise" in source.options:
        return source
    for name, default in defaults.items():
        if name in by_name and by_name[name].module == slot.module:
            if isinstance(default, Apply) and "otherwise" in default.options:
                return default
            return Apply("least_squares", source.args, {"otherwise": default})
    return source


def rows_of(slot: Slot, total: int, arguments: Arguments) -> tuple[int, int] | None:
    """The (start, stop) rows of a slot, None for all."""
    if slot.rows is None:
        return None
    index, count = slot.rows
    sizes = slot.sizes(arguments) if slot.sizes else (total // count,) * count
    return sum(sizes[:index]), sum(sizes[: index + 1])


def _unknown_slot(
    spec: OperatorSpec, name: str, slots: tuple[str, ...], context: Context, span: Span | None
) -> None:
    absent = spec.slot(name)
    near = nearest(name, slots)
    fail(
        "G402",
        f"operator `{spec.name}` has no slot `{name}`"
        + (_condition(absent.when) if absent is not None and absent.when else ""),
        span=span,
        site=context.path,
        wanted=", ".join(slots) or "no slots",
        help=f"write `{near}`" if near else None,
    )


def _condition(when: str) -> str:
    return f" but where `{when}`" if "=" in when else f" where {when} is false"
