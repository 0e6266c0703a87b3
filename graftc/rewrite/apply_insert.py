"""Insert: a new module between a site's call and what reads it; copies of modules."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from graftc.diagnostics import fail
from graftc.program.dropout import hand_over
from graftc.program.program import Program, value
from graftc.rewrite.apply_common import (
    check_shape,
    find_call,
    local,
    mark,
    place,
    shape_of,
    stream_of,
)
from graftc.rewrite.edits import Copied, Edit, NewModule
from graftc.rewrite.tree import set_module, shallow

INSERTED = "graft_inserted"
"""Node meta of a call: the name of the call that was inserted after it."""


def insert_after(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    """What read the site's output reads the new module's; a copy has the site's other inputs."""
    (site,), (new,) = edit.sites, edit.new
    graph, call = find_call(root, edit.graph, site.node)
    if shape_of(value(call)) is None:
        fail(
            "G455",
            f"{site.path} does not return one tensor; nothing can be inserted after it",
            span=edit.rule.edit.span,
            site=site.path,
            wanted="one tensor [batch, tokens, dim]",
            found=str(value(call)),
        )
    end = _end(graph, call)
    users = list(end.users)
    if new.copied is not None:
        source = find_call(root, edit.graph, new.site.node)[1]
        index = stream_of(source, new.site)
        made = call_copy(root, program, edit, new, source, (index, end), end, on_meta)
    else:
        module = place(root, new, end, on_meta)
        with graph.inserting_after(end):
            made = graph.call_module(local(edit.graph, new.path), (end,))
        made.meta["val"] = value(call)
        check_shape(module, made, new)
    for user in users:
        user.replace_input_with(end, made)
    end.meta[INSERTED] = made.name
    mark(made, edit, new.path)


def _end(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """The last of what other rules inserted after a call, else the call."""
    nodes = {n.name: n for n in graph.nodes}
    while INSERTED in call.meta and call.meta[INSERTED] in nodes:
        call = nodes[call.meta[INSERTED]]
    return call


def call_copy(
    root: fx.GraphModule,
    program: Program,
    edit: Edit,
    new: NewModule,
    source: fx.Node,
    stream: tuple[int, fx.Node],
    after: fx.Node,
    on_meta: bool,
) -> fx.Node:
    """Put a copy into the tree, and call it as `source` is called but for its stream."""
    assert new.copied is not None
    set_module(root, new.path, copied(program, new.copied, on_meta))
    index, given = stream
    args = (*source.args[:index], given, *source.args[index + 1 :])
    with source.graph.inserting_after(after):
        node = source.graph.call_module(local(edit.graph, new.path), args, dict(source.kwargs))
    node.meta["val"] = value(source)
    hand_over(source, node)
    return node


def copied(program: Program, wanted: Copied, on_meta: bool) -> nn.Module:
    """A copy of a module of the original with weights of its own, some of them zero."""
    module = _clone(program.module(wanted.source), on_meta, {})
    with torch.no_grad():
        for ref in wanted.zero:
            weight = module.get_parameter(ref.weight.removeprefix(wanted.source + "."))
            bias = (
                module.get_parameter(ref.bias.removeprefix(wanted.source + "."))
                if ref.bias
                else None
            )
            if weight.is_meta:
                continue
            stored = weight.t() if ref.transposed else weight  # [out, in], a view
            stored[
                _index(ref.rows, stored.shape[0]).unsqueeze(1), _index(ref.columns, stored.shape[1])
            ] = 0
            if bias is not None:
                bias[_index(ref.rows, bias.shape[0])] = 0
    return module


def _index(numbers: tuple[int, ...] | None, count: int) -> torch.Tensor:
    return torch.arange(count) if numbers is None else torch.tensor(numbers)


def _clone(
    module: nn.Module, on_meta: bool, memo: dict[int, nn.Module | nn.Parameter]
) -> nn.Module:
    """A deep copy of a tree: graphs copied, tensors cloned, what is shared inside shared again."""
    if id(module) in memo:
        found = memo[id(module)]
        assert isinstance(found, nn.Module)
        return found
    opaque = not isinstance(module, fx.GraphModule) and type(module) is not nn.Module
    shell = copy.copy(module) if opaque else shallow(module)
    memo[id(module)] = shell
    shell._parameters = {
        n: None if p is None else _cloned(p, on_meta, memo) for n, p in module._parameters.items()
    }
    shell._buffers = {
        n: None if b is None else (b.to("meta") if on_meta else b.detach().clone())
        for n, b in module._buffers.items()
    }
    shell._modules = {
        n: None if m is None else _clone(m, on_meta, memo) for n, m in module._modules.items()
    }
    return shell


def _cloned(
    parameter: nn.Parameter, on_meta: bool, memo: dict[int, nn.Module | nn.Parameter]
) -> nn.Parameter:
    if id(parameter) not in memo:
        data = parameter.detach()
        data = data.to("meta") if on_meta else data.clone()
        memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
    made = memo[id(parameter)]
    assert isinstance(made, nn.Parameter)
    return made
