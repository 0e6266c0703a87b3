"""`insert op(…) after a`, `insert copy(b) after b`: a new module on the way of a site's output."""

from __future__ import annotations

from dataclasses import replace

from graftc.diagnostics import Span, fail
from graftc.language.rules import CopyOf, Insert, OperatorCall
from graftc.operators.spec import Cost, OperatorSpec
from graftc.program.analysis import Site
from graftc.rewrite.arguments import resolve_arguments
from graftc.rewrite.block_parts import part_ref
from graftc.rewrite.chosen_forms import chosen
from graftc.rewrite.edits import Copied, Edit, NewModule, Place
from graftc.rewrite.user_files import unread
from graftc.rewrite.user_operator import spec_at
from graftc.weights.sources import parts_of


def insert_edit(place: Place, edit: Insert) -> Edit:
    """The edit at a match. Raises GraftError where the operator does not fit there."""
    site = place.match.bindings[edit.after]
    if isinstance(edit.new, CopyOf):
        new = copy_module(place, edit.new, place.fresh(site.path))
        source = place.match.bindings[edit.new.binding]
        if source is not site and source.graph != site.graph:
            fail(
                "G452",
                f"a copy of {source.path} cannot stand after {site.path}",
                span=edit.span,
                site=site.path,
                wanted="blocks that one graph calls",
            )
    else:
        new = _operator(place, edit.new, site)
    return Edit("insert", place.rule, place.match, (site,), site.graph, (new,))


def copy_module(place: Place, copy: CopyOf, path: str) -> NewModule:
    """`copy(b)` as a new module at `path`: as many parameters and FLOPs as the block."""
    source = place.match.bindings[copy.binding]
    if source.role != "block":
        fail(
            "G452",
            f"{source.path} is no block, and `copy` takes blocks",
            span=copy.span,
            site=source.path,
            wanted="a block",
            found=source.role,
        )
    zero = tuple(part_ref(place.analysis, place.match, p, copy.span) for p in copy.zero)
    return NewModule(
        path, _copy_spec(source), {}, "block", source, copied=Copied(source.path, zero)
    )


def _copy_spec(source: Site) -> OperatorSpec:
    params, flops = source.facts.get("params"), source.facts.get("flops")
    cost = Cost(params if isinstance(params, int) else 0, flops if isinstance(flops, int) else 0, 0)
    return OperatorSpec(
        name="copy",
        module="",
        summary=f"a copy of {source.path}",
        roles=("block",),
        mixes="tokens",
        args=(),
        slots=(),
        inits={},
        cost=lambda arguments, tokens: cost,
    )


def _operator(place: Place, call: OperatorCall, site: Site) -> NewModule:
    unread(call.spec, call.span)
    arguments = resolve_arguments(call, site, place.match, place.rule.drop)
    call = replace(call, spec=spec_at(call, arguments, site, place.analysis))
    _check_causal(place, call.spec, call.spec.is_causal(arguments), site, call.span)
    arguments, choice = chosen(call, arguments, site, place.machine)
    path, role = place.fresh(site.path), _role(call.spec, site)
    return NewModule(path, call.spec, arguments, role, site, choice=choice)


def _check_causal(place: Place, spec: OperatorSpec, causal: bool, site: Site, span: Span) -> None:
    """After a causal attention, or a block with one, nothing may look at later tokens."""
    inside = (site.path, site.path + ".")
    there = [
        s
        for s in place.analysis.sites
        if "causal" in s.has and (s.path == inside[0] or s.path.startswith(inside[1]))
    ]
    if there and spec.mixes == "tokens" and not causal:
        fail(
            "G353",
            f"`{spec.name}` after {site.path} would see later tokens; {there[0].path} is causal",
            span=span,
            site=site.path,
            wanted="a causal operator",
            help=f"write `{spec.name}(…, causal = true)`"
            if spec.arg("causal")
            else "choose a causal operator",
        )


def _role(spec: OperatorSpec, site: Site) -> str:
    """The role whose default inits apply: one that reads no parts, as the site itself stays."""
    for role in (site.role, *spec.inits):
        sources = spec.inits.get(role)
        if sources is not None and not any(parts_of(s) for s in sources.values()):
            return role
    return site.role
