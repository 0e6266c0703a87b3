"""Edits of one call: replace, remove, skip."""

from __future__ import annotations

from torch import fx

from graftc.diagnostics import fail
from graftc.program.dropout import hand_out
from graftc.program.program import ATEN, Program, value
from graftc.rewrite.apply_common import (
    STREAM,
    call_arguments,
    check_shape,
    check_single_use,
    find_call,
    mark,
    place,
    shape_of,
)
from graftc.rewrite.edits import Edit
from graftc.rewrite.inputs import check_mask


def replace_site(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    (site,) = edit.sites
    if not edit.new:  # `one of {keep, …}`: the student keeps the site
        return
    (new,) = edit.new
    graph, node = find_call(root, edit.graph, site.node)
    check_single_use(program, site.path)
    module = place(root, new, node.args[site.stream], on_meta)
    node.args, node.kwargs = call_arguments(new, node)
    node.meta[STREAM] = 0
    hand_out(program.module(site.path), node)
    if "mask" in node.kwargs:
        mask, stream = (value(n).shape for n in (node.kwargs["mask"], node.args[0]))
        check_mask(new.path, tuple(mask), tuple(stream), edit.rule.edit.span)
    mark(node, edit, site.path)
    check_shape(module, node, new)
    del graph


def remove_site(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    (site,) = edit.sites
    graph, node = find_call(root, edit.graph, site.node)
    with graph.inserting_before(node):
        zero = graph.call_function(ATEN.zeros_like.default, (node.args[site.stream],))
    stream = node.args[site.stream]
    assert isinstance(stream, fx.Node)
    zero.meta["val"] = value(stream)
    if shape_of(value(node)) != shape_of(value(stream)):
        fail(
            "G359",
            f"{site.path} does not return what it reads; it cannot be removed",
            span=edit.rule.edit.span,
            site=site.path,
            wanted=str(shape_of(value(stream))),
            found=str(shape_of(value(node))),
        )
    node.replace_all_uses_with(zero)
    graph.erase_node(node)
    _fold_zero(graph, zero)


def _fold_zero(graph: fx.Graph, zero: fx.Node) -> None:
    """0 · x is 0 and x + 0 is x, so that nothing of a removed branch is left behind."""
    zeros = [zero]
    while zeros:
        current = zeros.pop()
        for user in list(current.users):
            others = [a for a in user.args[:2] if isinstance(a, fx.Node) and a is not current]
            same = shape_of(value(user)) == shape_of(value(current))
            if user.target is ATEN.mul.Tensor and same:
                zeros.append(user)
            elif (
                user.target is ATEN.add.Tensor
                and others
                and shape_of(value(user)) == shape_of(value(others[0]))
            ):
                user.replace_all_uses_with(others[0])
                graph.erase_node(user)


def skip_block(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    (site,) = edit.sites
    graph, node = find_call(root, edit.graph, site.node)
    stream = node.args[site.stream]
    assert isinstance(stream, fx.Node)
    if shape_of(value(node)) != shape_of(value(stream)):
        fail(
            "G359",
            f"{site.path} returns more than the residual stream; it cannot be skipped",
            span=edit.rule.edit.span,
            site=site.path,
            wanted=str(shape_of(value(stream))),
            found=str(value(node)),
        )
    node.replace_all_uses_with(stream)
    graph.erase_node(node)
