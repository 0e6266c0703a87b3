"""Products of complex numbers are written with real ones: rotary positions in complex form are then as any others.

`view_as_real(view_as_complex(x) * table)` is what Lumina and the original Llama write. Complex constants of double
precision, which no safetensors file holds, are kept as their real and imaginary parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graftc.program import sizes
from graftc.program.program import ATEN, graphs, value


def to_real(module: fx.GraphModule) -> None:
    """Rewrite such products, and the complex128 constants that capture made, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr":
            _split_constant(module, node)
        elif node.op == "call_function" and node.target is ATEN.view_as_real.default:
            _rewrite(graph, node)


def real_inputs(root: fx.GraphModule) -> None:
    """Hand every inner graph a table of complex numbers as real ones, in place: cos, sin, cos, sin, ….

    So it is an input like any table of rotary positions, which an operator in the graph's place can take.
    """
    sites = sizes.call_sites(root)
    for path, module in graphs(root):
        if not path:
            continue
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        for index, node in enumerate(places):
            given = value(node)
            if not isinstance(given, torch.Tensor) or not given.is_complex() or not given.ndim:
                continue
            for site in sites.get(id(module), []):
                site.update_arg(index, _real(site, site.args[index]))
            first = next(n for n in module.graph.nodes if n.op != "placeholder")
            users = list(node.users)
            with module.graph.inserting_before(first):
                call = _Calls(module.graph, users[0] if users else node)
                node.meta["val"] = torch.view_as_real(given).flatten(-2)
                pairs = call(ATEN.unflatten.int, node, -1, [given.shape[-1], 2])
                whole = call(ATEN.view_as_complex.default, pairs)
            for user in users:
                user.replace_input_with(node, whole)


def _real(site: fx.Node, given: Any) -> fx.Node:
    """The real form of a value at a call, without the way there and back where it has one already."""
    if given.target is ATEN.view_as_complex.default:
        pairs = given.args[0]
        if pairs.target is ATEN.unflatten.int:
            return pairs.args[0]
    call = _Calls(site.graph, site)
    with site.graph.inserting_before(site):
        return call(ATEN.flatten.using_ints, call(ATEN.view_as_real.default, given), -2)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    product = node.args[0]
    if not isinstance(product, fx.Node) or product.target is not ATEN.mul.Tensor:
        return
    factors = list(product.args)
    ours = next((f for f in factors if _is_viewed(f)), None)
    if ours is None:
        return
    table: Any = factors[1 - factors.index(ours)]
    if not isinstance(table, fx.Node) or not value(table).is_complex():
        return
    call = _Calls(graph, node)
    with graph.inserting_before(node):
        pairs: Any = ours.args[0]  # pyright: ignore[reportAttributeAccessIssue]
        angles = call(ATEN.view_as_real.default, table)
        cos, sin = (call(ATEN.select.int, angles, -1, i) for i in (0, 1))
        one, two = (call(ATEN.select.int, pairs, -1, i) for i in (0, 1))
        first = call(
            ATEN.sub.Tensor, call(ATEN.mul.Tensor, one, cos), call(ATEN.mul.Tensor, two, sin)
        )
        second = call(
            ATEN.add.Tensor, call(ATEN.mul.Tensor, two, cos), call(ATEN.mul.Tensor, one, sin)
        )
        result = call(ATEN.stack.default, [first, second], -1)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _is_viewed(factor: Any) -> bool:
    return isinstance(factor, fx.Node) and factor.target is ATEN.view_as_complex.default


def _split_constant(module: fx.GraphModule, node: fx.Node) -> None:
    """A complex128 buffer outside of the state dict becomes its real form, and the graph puts it together."""
    name = str(node.target)
    held = module._buffers.get(name)
    outside = name in module._non_persistent_buffers_set
    if held is None or held.dtype is not torch.complex128 or not outside:
        return
    real = f"{name}_as_real"
    if real not in module._buffers:
        parts = torch.view_as_real(held.resolve_conj()).clone()
        module.register_buffer(real, parts, persistent=False)
    with module.graph.inserting_before(node):
        attribute = module.graph.get_attr(real)
        attribute.meta["val"] = torch.view_as_real(value(node))
        made = _Calls(module.graph, node)(ATEN.view_as_complex.default, attribute)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    if not any(n.op == "get_attr" and n.target == name for n in module.graph.nodes):
        _forget(module, name)


def _forget(module: nn.Module, name: str) -> None:
    module._buffers.pop(name)
    module._non_persistent_buffers_set.discard(name)


class _Calls:
    """Calls of ops with their fake values, at the place and line of another node."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.trace = graph, like.meta.get("stack_trace")

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, value))
        node.meta["stack_trace"] = self.trace
        return node
