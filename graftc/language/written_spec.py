"""From an operator's body to its spec: arguments, slots, default first weights, cost, what it mixes."""

from __future__ import annotations

from graftc.language import syntax as s
from graftc.language.written import Body, read_body, slots_of
from graftc.operators.spec import (
    Apply,
    Arguments,
    Const,
    InitSource,
    OfSite,
    OperatorSpec,
    Part,
    Slot,
)
from graftc.operators.written import Step, Written

_PASSES = ("depthwise_conv",)
"""Ops of which a channel's output is of that channel's input alone: rows keep their names."""

_PARTS = {"self_attention": ("q", "k", "v"), "mlp": ("up", "gate")}
_LAST = {"self_attention": "out", "mlp": "down"}


def spec_of(item: s.OperatorItem, place: str) -> OperatorSpec:
    """The spec of an `operator` item. Raises GraftError with its mistakes."""
    written, body = read_body(item, place)
    mixing = {step.mixing for step in written.steps}
    mixes = "tokens" if mixing != {"no"} else "channels"
    roles = ("self_attention",) if mixes == "tokens" else ("self_attention", "mlp")
    slots = slots_of(written, body)
    causal = mixes == "tokens" and "all" not in mixing
    return OperatorSpec(
        name=item.name.text,
        module="",
        summary=f"an operator of {place}",
        roles=roles,
        mixes=mixes,
        args=body.args,
        slots=slots,
        inits={role: _inits(written, body, slots, role) for role in roles},
        cost=written.cost,
        keeps=("causal",) if causal or _may_be_causal(written) else (),
        source=place,
        length="free" if not _needs_tokens(body) else "fixed",
        written=written,
    )


def _may_be_causal(written: Written) -> bool:
    return any(step.op == "choose" for step in written.steps)


def _needs_tokens(body: Body) -> bool:
    """Whether a size is the site's token count, and so no other length fits."""
    return any(isinstance(a.default, OfSite) and a.default.fact == "tokens" for a in body.args)


def _inits(
    written: Written, body: Body, slots: tuple[Slot, ...], role: str
) -> dict[str, InitSource]:
    """What the operator says; else the site's parts by their names, the identity, torch.nn's default."""
    found: dict[str, InitSource] = {}
    steps = {step.name: step for step in written.steps if step.name is not None}
    names = {x.name for x in slots}
    for slot in slots:
        if slot.rows is not None:
            continue
        rows = [x.name for x in slots if x.module == slot.module and x.rows is not None]
        step = steps[slot.name]
        if slot.name in body.inits:
            found[slot.name] = _centred(step, body.inits[slot.name])
        elif rows and all(r in _PARTS.get(role, ()) for r in rows):
            found |= {r: Part("site", r) for r in rows}
        elif slot.name in _PARTS.get(role, ()):
            found[slot.name] = Part("site", slot.name)
        elif slot.last and step.op == "linear":
            start = Part("site", _LAST[role]) if _has_site_parts(names, role) else Apply("zero")
            found[slot.name] = Apply("least_squares", options={"otherwise": start})
        elif step.op == "depthwise_conv":
            found[slot.name] = _centred(step, Apply("identity"))
        elif step.op.endswith("_norm"):
            found[slot.name] = Apply("random")  # torch.nn's own: scale one, shift zero
    return found


def _centred(step: Step, source: InitSource) -> InitSource:
    """The identity of a convolution, whose tap depends on whether it is causal."""
    causal = step.settings.get("causal")
    if isinstance(source, Apply) and source.policy == "identity" and isinstance(causal, bool):
        return Apply("identity", options={"causal": Const(causal)})
    return source


def _has_site_parts(names: set[str], role: str) -> bool:
    """Whether the last map reads what the site's own does, as far as names tell."""
    return any(p in names for p in _PARTS[role])


def row_slots(written: Written, body: Body, at: int) -> list[Slot]:
    """The rows of a linear that a split names, also after a depthwise convolution."""
    step = written.steps[at]
    if step.op != "linear" or step.name is None:
        return []
    value = len(written.inputs) + sum(len(x.shapes) for x in written.steps[:at])
    for later in written.steps[at + 1 :]:
        if value not in later.inputs:
            continue
        if later.op in _PASSES:
            value = _first(written, later)
        elif later.op == "split":
            return _rows(written, body, step.name, later)
        else:
            return []
    return []


def _first(written: Written, step: Step) -> int:
    count = len(written.inputs)
    for other in written.steps:
        if other is step:
            return count
        count += len(other.shapes)
    raise AssertionError(step)


def _rows(written: Written, body: Body, module: str, split: Step) -> list[Slot]:
    first = _first(written, split)
    names, shapes = body.words, split.shapes
    count = len(shapes)
    widths = [shape[-1] for shape in shapes]

    def sizes(arguments: Arguments) -> tuple[int, ...]:
        return tuple(w.at(arguments) for w in widths)

    found = [names.get(first + i) for i in range(count)]
    if any(n is None for n in found):
        return []
    return [Slot(str(n), module, rows=(i, count), sizes=sizes) for i, n in enumerate(found)]
