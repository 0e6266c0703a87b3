"""What an `init` source of a whole operator gives each of its slots: of two thin maps, of an MLP of another width."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graftc.operators.spec import SITE, Apply, Const, InitSource, Part
from graftc.weights import policies
from graftc.weights.fresh import fresh
from graftc.weights.parts import Affine
from graftc.weights.sources import (
    WHOLE_POLICIES,
    Context,
    constant,
    evaluate,
    missing_part,
    whole_number,
)


def evaluate_whole(
    source: InitSource, context: Context, slots: Mapping[str, tuple[str, nn.Module]]
) -> dict[str, Affine]:
    """What a source of the whole operator gives each slot: slot → (path, submodule) in."""
    if isinstance(source, Apply) and source.policy == "svd":
        return _thin(source, context, slots)
    if isinstance(source, Apply) and source.policy in WHOLE_POLICIES:
        return _resized(source, context, slots)
    if isinstance(source, Part) and source.name is None:
        parts = context.parts.get(context.name(source.site), {})
        wanted = {slot: parts.get(slot) for slot in slots}
        return {
            slot: part or missing_part(context.name(source.site), slot, tuple(parts), context)
            for slot, part in wanted.items()
        }
    return {
        slot: evaluate(source, context, submodule, path)
        for slot, (path, submodule) in slots.items()
    }


def _thin(
    source: Apply, context: Context, slots: Mapping[str, tuple[str, nn.Module]]
) -> dict[str, Affine]:
    """`svd`: the best product of the operator's two thin maps, the inner one first."""
    if len(slots) != 2:
        context.refuse("G408", f"`svd` fills two maps, and `{context.operator}` has {len(slots)}")
    (inner, (_, thin)), (outer, _) = slots.items()
    site = source.args[0] if source.args else Part(SITE)
    if isinstance(site, Part) and site.name is None:
        site = Part(site.site, "map")
    found = evaluate(site, context, thin, inner)
    rank = thin.get_parameter("weight").shape[0]
    if "rank" in source.options and (given := whole_number(context, source, "rank", 1)) != rank:
        context.refuse(
            "G408", f"`svd` of rank {given}, and the maps of `{context.operator}` have {rank}",
            "leave `rank` out: it is the operator's",
        )  # fmt: skip
    if found.weight.is_meta:
        rows, columns = found.weight.shape
        like = found.weight.new_empty
        return {inner: Affine(like(rank, columns)), outer: Affine(like(rows, rank), found.bias)}
    made = policies.svd(found, rank)
    return {inner: made[0], outer: made[1]}


def _resized(
    source: Apply, context: Context, slots: Mapping[str, tuple[str, nn.Module]]
) -> dict[str, Affine]:
    """`resize` and `keep_top`: an MLP of another width. By activation: by magnitude, until data says."""
    site = source.args[0] if source.args else Part(SITE)
    binding = context.name(site.site) if isinstance(site, Part) else context.binding
    parts = context.parts.get(binding, {})
    for slot in slots:
        if slot not in parts:
            missing_part(binding, slot, tuple(parts), context)
    # A gate that the operator has no place for must not vanish without a word.
    if "gate" in parts and "gate" not in slots:
        context.refuse("G404", f"`{binding}` is gated, and `{context.operator}` is not")
    by = constant(source.options.get("by", Const("magnitude")))
    if by not in ("magnitude", "activation"):
        context.refuse(
            "G405",
            f"`{source.policy}` cannot choose by `{by}`",
            "write `by = magnitude`, or `by = activation`, which needs data",
        )
    mlp = {name: parts[name] for name in slots}
    width = slots["up"][1].get_parameter("weight").shape[0]
    have = mlp["up"].weight.shape[0]
    if width == have:
        return {name: policies.copy(part) for name, part in mlp.items()}
    if width < have:
        return policies.keep_top(mlp, width, policies.magnitude(mlp))
    if source.policy == "keep_top":
        context.refuse(
            "G405",
            f"`keep_top` cannot choose {width} neurons of {have}",
            "drop the clause: the default copies all and zeroes the new columns",
        )
    made = {
        name: fresh(submodule, context.seed, f"{context.path}.{path}")
        for name, (path, submodule) in slots.items()
    }
    device = mlp["up"].weight
    return policies.widen(
        mlp,
        {
            n: Affine(m.weight.to(device), None if m.bias is None else m.bias.to(device))
            for n, m in made.items()
        },
    )
