"""Norms as modules: what they normalise, and the scale and shift that they end with."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from graftc.program.program import ATEN, structure_hash
from graftc.program.roles import NORMS

_CASTS = (ATEN.to.dtype, ATEN.type_as.default, ATEN.to.other)


def affine_tail(module: nn.Module) -> tuple[str | None, str | None] | None:
    """The names of the scale and the shift with which a norm ends; None for what is no such norm.

    `norm(x) · scale + shift`, as one op or written out; both are parameters that nothing else reads.

    >>> import torch
    >>> from graftc.program.capture import capture
    >>> from graftc.program.model import Model
    >>> layer = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    >>> affine_tail(capture(Model(layer, {"input": torch.zeros(2, 4)})).module("0"))
    ('weight', 'bias')
    """
    if not isinstance(module, fx.GraphModule) or list(module.children()):
        return None
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node):
        return None
    norm = next((n for n in module.graph.nodes if n.target in NORMS), None)
    if norm is not None:
        found = _of_op(norm) if _uncast(output) is norm else None
    else:
        found = _written_out(output)
    return found if found is not None and _all_read_once(module, found) else None


def _of_op(node: fx.Node) -> tuple[str | None, str | None]:
    tensors = [
        str(a.target)
        for a in (*node.args[1:], *node.kwargs.values())
        if isinstance(a, fx.Node) and a.op == "get_attr"
    ]
    return (tensors[0] if tensors else None, tensors[1] if len(tensors) > 1 else None)


def _written_out(output: fx.Node) -> tuple[str | None, str | None]:
    node, shift = _uncast(output), None
    if node.target is ATEN.add.Tensor and (name := _vector(node)) is not None:
        shift, node = name, _uncast(_other(node))
    if node.target is ATEN.mul.Tensor and (name := _vector(node)) is not None:
        return name, shift
    return None, shift


def _uncast(node: fx.Node) -> fx.Node:
    while node.target in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _vector(node: fx.Node) -> str | None:
    """The parameter, one number a channel, among two operands."""
    for a in node.args[:2]:
        given: Any = _uncast(a) if isinstance(a, fx.Node) else None
        if given is not None and given.op == "get_attr" and given.meta["val"].ndim == 1:
            return str(given.target)
    return None


def _other(node: fx.Node) -> fx.Node:
    name = _vector(node)
    for a in node.args[:2]:
        if isinstance(a, fx.Node) and str(_uncast(a).target) != name:
            return a
    raise AssertionError(node)


def _all_read_once(module: fx.GraphModule, tail: tuple[str | None, str | None]) -> bool:
    """No parameter but these two, each read once: the rest of the norm has nothing that is learned."""
    read = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
    used = [n for n in tail if n is not None]
    learned = [n for n in read if n in module._parameters]
    return sorted(learned) == sorted(used)


def same_norm(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two norms differ in nothing but the values of scale and shift."""
    return structure_hash(one) == structure_hash(other)
