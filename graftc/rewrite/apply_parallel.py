"""Branches in parallel: several calls read one input, and a merge makes one output of theirs."""

from __future__ import annotations

import itertools

from torch import fx

from graftc.diagnostics import fail
from graftc.program.program import Program, value
from graftc.rewrite.apply_common import check_shape, find_call, local, mark, place, stream_of
from graftc.rewrite.apply_insert import call_copy
from graftc.rewrite.edits import Edit


def parallel_branches(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    graph, first = find_call(root, edit.graph, edit.sites[0].node)
    stream = first.args[stream_of(first, edit.sites[0])]
    own = first.args
    assert isinstance(stream, fx.Node)
    sites = {s.path: s for s in edit.sites}
    _check_chain(root, edit)
    last = find_call(root, edit.graph, edit.sites[-1].node)[1]
    results: list[fx.Node] = []
    position = last
    for path in edit.branches:
        if path in sites:
            node = find_call(root, edit.graph, sites[path].node)[1]
            index = stream_of(node, sites[path])
            node.args = (*node.args[:index], stream, *node.args[index + 1 :])
        else:
            new = next(n for n in edit.new if n.path == path)
            if new.copied is not None:
                source = find_call(root, edit.graph, new.site.node)[1]
                index = stream_of(source, new.site)
                at = (index, stream)
                node = call_copy(root, program, edit, new, source, at, position, on_meta)
                mark(node, edit, path)
                results.append(node)
                position = node
                continue
            module = place(root, new, stream, on_meta)
            with graph.inserting_after(position):
                kept = {name: own[i] for name, i in new.inputs.items()}
                node = graph.call_module(local(edit.graph, path), (stream,), kept)
            node.meta["val"] = value(last)
            check_shape(module, node, new)
            position = node
        mark(node, edit, path)
        results.append(node)
    uses = list(last.users)
    merged = _merge(root, graph, edit, stream, results, position, on_meta)
    for user in uses:
        user.replace_input_with(last, merged)
    mark(merged, edit, edit.name)


def _merge(
    root: fx.GraphModule,
    graph: fx.Graph,
    edit: Edit,
    stream: fx.Node,
    results: list[fx.Node],
    after: fx.Node,
    on_meta: bool,
) -> fx.Node:
    new = edit.new[-1]
    given = (stream, *results) if edit.of_blocks and edit.merge == "sum" else tuple(results)
    place(root, new, stream, on_meta)
    with graph.inserting_after(after):
        node = graph.call_module(local(edit.graph, new.path), given)
    node.meta["val"] = value(results[-1])
    return node


def _check_chain(root: fx.GraphModule, edit: Edit) -> None:
    """Between the branches nothing else may use what the earlier ones made."""
    nodes = [find_call(root, edit.graph, s.node)[1] for s in edit.sites]
    for before, after in itertools.pairwise(nodes):
        others = [u for u in before.users if u is not after]
        if others:
            fail(
                "G362",
                f"`{others[0].name}` also reads the output of {before.target}",
                span=edit.rule.edit.span,
                site=edit.name,
                help="blocks in parallel must be neighbours that only feed each other",
            )
