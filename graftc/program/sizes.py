"""Sizes that tracing threads from module to module are read off a tensor where they are used.

`unflatten` hands a dynamic size (the batch) to each inner module as an argument, and returns
sizes that one module computed and a later one shares. No model is written so, and an edit that
removes the one would break the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx, nn

from graftc.program.program import ATEN, graphs, sweep, value

_BINARY: dict[str, Callable[..., Any]] = {
    "Mul": operator.mul,
    "Add": operator.add,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


def unthread(root: fx.GraphModule) -> None:
    """Remove inputs and outputs that are sizes, and any that nobody uses, from every inner graph."""
    sites = call_sites(root)
    for path, module in reversed(list(graphs(root))):
        if path:
            sweep(module.graph)
            read_sizes_here(module.graph)
            _drop_unused_inputs(module.graph, sites.get(id(module), []))
    for path, module in reversed(list(graphs(root))):
        if path:
            _pass_by(module.graph, sites.get(id(module), []))
    for path, module in graphs(root):
        if path:
            drop_unused_outputs(module, sites.get(id(module), []))
        sweep(module.graph)
    drop_unused_inputs(root)


def read_sizes_here(graph: fx.Graph) -> None:
    """Let a graph compute the sizes that are its inputs from its tensor inputs, where they determine them."""
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.users]:
        if isinstance(value(node), torch.SymInt):
            _read_here(graph, node)


def drop_unused_inputs(root: fx.GraphModule) -> None:
    """Remove inputs that nobody uses from every inner graph, and from its calls."""
    sites = call_sites(root)
    for path, module in reversed(list(graphs(root))):
        if path:
            sweep(module.graph)
            _drop_unused_inputs(module.graph, sites.get(id(module), []))
    sweep(root.graph)


def call_sites(root: nn.Module) -> dict[int, list[fx.Node]]:
    """id(module) → the nodes that call it."""
    sites: dict[int, list[fx.Node]] = {}
    for _, module in graphs(root):
        for node in module.graph.nodes:
            if node.op == "call_module":
                sites.setdefault(id(module.get_submodule(str(node.target))), []).append(node)
    return sites


def _read_here(graph: fx.Graph, node: fx.Node) -> None:
    """Compute a size input from the tensor inputs of its own graph, where they determine it."""
    wanted: sympy.Expr = value(node).node.expr
    places = _places(graph)
    if not all(str(s) in places for s in wanted.free_symbols) or not _is_simple(wanted):
        return
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        anchor = graph.call_function(operator.add, (0, 0))  # keeps the new nodes in order
    with graph.inserting_before(anchor):
        read = _build(graph, wanted, places)
    assert isinstance(read, fx.Node)
    read.meta["val"] = value(node)
    node.replace_all_uses_with(read)
    graph.erase_node(anchor)


def _places(graph: fx.Graph) -> dict[str, tuple[fx.Node, int]]:
    """Symbol → a tensor input and the dimension that is this symbol."""
    places: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        val = value(node)
        if node.op == "placeholder" and isinstance(val, torch.Tensor):
            for i, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt):
                    places.setdefault(str(size), (node, i))
    return places


def _is_simple(expression: sympy.Basic) -> bool:
    if isinstance(expression, (sympy.Symbol, sympy.Integer)):
        return True
    return type(expression).__name__ in _BINARY and all(_is_simple(a) for a in expression.args)


def _build(graph: fx.Graph, expression: Any, places: dict[str, tuple[fx.Node, int]]) -> Any:
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return graph.call_function(ATEN.sym_size.int, places[str(expression)])
    # Symbols before numbers, as people write and tracing records it: `batch * 16`.
    args = sorted(expression.args, key=lambda a: isinstance(a, sympy.Integer))
    built = [_build(graph, a, places) for a in args]
    result = built[0]
    for other in built[1:]:
        result = graph.call_function(_BINARY[type(expression).__name__], (result, other))
    return result


def _drop_unused_inputs(graph: fx.Graph, sites: list[fx.Node]) -> None:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    unused = {i for i, n in enumerate(placeholders) if not n.users}
    if not unused:
        return
    for site in sites:
        site.args = tuple(a for i, a in enumerate(site.args) if i not in unused)
    for i in unused:
        graph.erase_node(placeholders[i])


def _pass_by(graph: fx.Graph, sites: list[fx.Node]) -> None:
    """An input that is returned as it came is read by the caller where it had it."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    returned = next(n for n in graph.nodes if n.op == "output").args[0]
    if not isinstance(returned, tuple):
        return
    same = {i: placeholders.index(r) for i, r in enumerate(returned) if r in placeholders}
    for site in sites:
        for user in list(site.users):
            if user.target is operator.getitem and user.args[1] in same:
                user.replace_all_uses_with(site.args[same[user.args[1]]])  # pyright: ignore[reportArgumentType]
                user.graph.erase_node(user)


def drop_unused_outputs(module: fx.GraphModule, sites: list[fx.Node]) -> None:
    """An output that no caller takes is not returned; a single one that is left is no tuple."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    returned = output.args[0]
    if not isinstance(returned, tuple) or not sites:
        return
    takes = [u for s in sites for u in s.users]
    if any(u.op != "call_function" or u.target is not operator.getitem for u in takes):
        return
    for user in takes:
        if not user.users:
            user.graph.erase_node(user)
    takes = [u for s in sites for u in s.users]
    kept = sorted({int(u.args[1]) for u in takes})  # pyright: ignore[reportArgumentType]
    if len(kept) == len(returned) and len(kept) > 1:
        return
    if len(kept) == 1:
        output.args = (returned[kept[0]],)
        for user in takes:
            call = user.args[0]
            assert isinstance(call, fx.Node)
            call.meta["val"] = value(user)
            user.replace_all_uses_with(call)
            user.graph.erase_node(user)
    else:
        output.args = (tuple(returned[i] for i in kept),)
        for site in sites:
            had = site.meta.get("val")
            if isinstance(had, (list, tuple)):
                site.meta["val"] = [had[i] for i in kept]
        for user in takes:
            user.args = (user.args[0], kept.index(int(user.args[1])))  # pyright: ignore[reportArgumentType]
