"""Which source fills which slot: a rule's `init` clause over the spec's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Union

from torch import nn

from graftc.diagnostics import Span, fail, nearest
from graftc.operators.spec import (
    WHOLE,
    Apply,
    Arguments,
    Const,
    InitSource,
    OperatorSpec,
    Slot,
    holds,
)
from graftc.weights.fit import SWEEPS, WIDEST, Block, Fit
from graftc.weights.sources import Context, pending, unfold

Clauses = Iterable[tuple[Union[str, None], InitSource]]
"""A rule's `init` clause: (slot, source); the slot is None where the source fills all of them."""


@dataclass(frozen=True)
class Assignment:
    """One source for one slot; `whole` where it fills all the operator's slots together.

    `fit`: what gives the slot its last word, once calibration data is there.
    """

    slot: Slot
    source: InitSource
    whole: bool
    span: Span | None
    fit: Fit | None = None


def assign(
    spec: OperatorSpec,
    role: str,
    clauses: Clauses,
    context: Context,
    spans: Mapping[str | None, Span],
    module: nn.Module,
) -> list[Assignment]:
    """The sources in the order that they are written: whole, then slots, then rows of slots.

    Least squares of the whole operator gives no values of its own: it fits what the other sources
    give, the spec's defaults where it stands in a rule. `module` tells how many rows there are.
    """
    slots = present(spec, context.arguments)
    by_name = {s.name: s for s in slots}
    overrides = {WHOLE if slot is None else slot: source for slot, source in clauses}
    for name in overrides:
        if name != WHOLE and name not in by_name:
            _unknown_slot(spec, name, tuple(by_name), context, spans.get(name))
    defaults = spec.inits.get(role, {})
    plan: list[Assignment] = []
    for sources, given in ((defaults, False), (overrides, True)):
        if not given and WHOLE in overrides and not _is_fit(overrides[WHOLE]):
            continue
        for name, source in sources.items():
            source = unfold(source, context)
            span = spans.get(None if name == WHOLE else name) if given else None
            if name == WHOLE and _is_fit(source):
                continue
            if name == WHOLE:
                fit = _from_data(source, slots, module)
                plan += [Assignment(s, source, True, span, fit) for s in bodies(slots)]
                continue
            if name not in by_name:
                continue  # a default of a slot that these arguments leave out
            slot = by_name[name]
            at = next((i for i, a in enumerate(plan) if a.whole and a.slot is slot), None)
            if at is not None and slot.last and _is_fit(source) and source.options == {}:  # pyright: ignore[reportAttributeAccessIssue]
                # What fills the whole operator is where the fit begins.
                plan[at] = replace(plan[at], fit=Fit("least_squares", slot.module))
                continue
            if isinstance(source, Apply) and source.policy == "least_squares":
                source = _fitted(slot, source, defaults, by_name, replace(context, span=span))
            fit = Fit("least_squares", slot.module) if pending(source) else None
            plan.append(Assignment(slot, source, False, span, fit))
    # What a later source covers entirely is not computed at all.
    kept = [
        item
        for i, item in enumerate(plan)
        if not any(_covers(later.slot, item.slot) for later in plan[i + 1 :])
    ]
    kept = sorted(kept, key=lambda a: a.slot.rows is not None)
    asked = overrides.get(WHOLE)
    if asked is not None and _is_fit(asked):
        return _all_fitted(spec, kept, asked, (), replace(context, span=spans.get(None)), module)
    default = defaults.get(WHOLE)
    if asked is None and default is not None and _is_fit(default):
        fixed = tuple(by_name[name] for name in overrides)
        return _all_fitted(spec, kept, default, fixed, context, module)
    return kept


def _from_data(source: InitSource, slots: list[Slot], module: nn.Module) -> Fit | None:
    """What `svd(…, whiten = calibration)` and `keep_top(…, by = activation)` wait for."""
    if not isinstance(source, Apply):
        return None
    found = bodies(slots)
    if source.policy == "svd" and source.options.get("whiten") == Const("calibration"):
        inner, outer = (s.module for s in found[:2])
        rank = module.get_submodule(inner).get_parameter("weight").shape[0]
        return Fit("svd", outer, (Block(inner, 0, rank),))
    if source.policy in ("keep_top", "resize") and source.options.get("by") == Const("activation"):
        by_name = {s.name: s.module for s in found}
        names = [by_name[n] for n in ("up", "gate") if n in by_name]
        width = module.get_submodule(names[0]).get_parameter("weight").shape[0]
        return Fit("keep_top", by_name["down"], tuple(Block(n, 0, width) for n in names))
    return None


def _is_fit(source: InitSource) -> bool:
    return isinstance(source, Apply) and source.policy == "least_squares"


def _all_fitted(
    spec: OperatorSpec,
    plan: list[Assignment],
    source: InitSource,
    fixed: tuple[Slot, ...],
    context: Context,
    module: nn.Module,
) -> list[Assignment]:
    """The plan with every map fitted in which the operator is linear, but for those of `fixed` slots."""
    last = next((s for s in present(spec, context.arguments) if s.last), None)
    if last is None:
        context.refuse(
            "G406",
            f"`{spec.name}` does not end in a linear map, which least squares needs",
            "give its slots sources of their own",
        )
    taken = [_span_of(slot, module, context.arguments) for slot in fixed]
    if any(name == last.module for name, _, _ in taken):
        return (
            plan  # the rule has its own last map: what would feed another one is not its business
        )
    width = module.get_submodule(last.module).get_parameter("weight").shape[1]
    blocks: list[Block] = []
    for slot in spec.linear:
        if slot.when is not None and not holds(slot.when, context.arguments):
            continue
        name, start, stop = _span_of(slot, module, context.arguments)
        free = all(n != name or b <= start or stop <= a for n, a, b in taken)
        # Key-value heads that several query heads share feed several channels: not row by row.
        if free and stop - start == width:
            blocks.append(Block(name, start, stop))
    given = source.options.get("sweeps") if isinstance(source, Apply) else None
    sweeps = given.value if isinstance(given, Const) else SWEEPS
    fit = Fit("least_squares", last.module)
    if width > WIDEST:
        blocks = []
    if blocks and isinstance(sweeps, int) and sweeps > 0:
        fit = Fit("alternating", last.module, tuple(blocks), sweeps)

    def fits(slot: Slot) -> bool:
        name, start, stop = _span_of(slot, module, context.arguments)
        return name == last.module or any(
            b.module == name and b.start < stop and start < b.stop for b in blocks
        )

    return [replace(item, fit=fit) if fits(item.slot) else item for item in plan]


def _span_of(slot: Slot, module: nn.Module, arguments: Arguments) -> tuple[str, int, int]:
    """(module, start, stop) of a slot's rows."""
    if slot.parameter is not None:
        return f"{slot.module}:{slot.parameter}", 0, 0
    total = module.get_submodule(slot.module).get_parameter("weight").shape[0]
    start, stop = rows_of(slot, total, arguments) or (0, total)
    return slot.module, start, stop


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
