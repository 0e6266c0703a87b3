"""Normalisation: take out of a captured graph what tracing pinned.

After it a graph holds what the model computes and no trace of where it was traced: no
metadata assertions, no-op casts, dropout that is off, full slices or device constants, no
sizes threaded from module to module; an einsum that is a product of matrices is one,
and a product of complex numbers is one of real ones. So the result moves to another dtype and device and
trains, and patterns meet one form. Patterns go through the same passes as models.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from graftc.program import complex, dropout, einsum, sizes
from graftc.program.program import ATEN, generate_code, graphs, join, sweep, value

_ASSERTIONS = {
    ATEN._assert_tensor_metadata.default,
    ATEN._assert_scalar.default,
    ATEN._assert_async.msg,
    ATEN.sym_constrain_range_for_size.default,
    ATEN.sym_constrain_range.default,
}
_HUGE = 2**62


def normalise(root: fx.GraphModule) -> fx.GraphModule:
    """Normalise every graph of a freshly captured tree (which is consumed), children first."""
    complex.real_inputs(root)
    tree = list(graphs(root))
    for _, module in reversed(tree):
        _positional_outputs(module.graph)
        for node in list(module.graph.nodes):
            _drop_assertion(module.graph, node)
        for node in list(module.graph.nodes):
            _whole_batch_norm(node)
        for node in list(module.graph.nodes):
            if node.op == "call_function":
                if node.target is ATEN._unsafe_view.default:  # a reshape on the meta device
                    node.target = ATEN.view.default
                _unpin_device(node)
                _forward_no_op(node)
        einsum.to_matmul(module.graph)
        complex.to_real(module)
        sweep(module.graph)
    _inline_identities(root)
    sizes.unthread(root)
    for _, module in graphs(root):
        sweep(module.graph)
        module.graph.lint()
        generate_code(module)
    _drop_uncalled(root)
    return root


def _positional_outputs(graph: fx.Graph) -> None:
    """Outputs of an inner graph are a tensor or a tuple, never a list."""
    output = next(n for n in graph.nodes if n.op == "output")
    if isinstance(output.args[0], list):
        output.args = (tuple(output.args[0]),)


def _drop_assertion(graph: fx.Graph, node: fx.Node) -> None:
    if node.op == "call_function" and node.target in _ASSERTIONS:
        graph.erase_node(node)


def _forward_no_op(node: fx.Node) -> None:
    """Let the users of a no-op use its input, and take the no-op away."""
    rule = _NO_OPS.get(node.target)  # pyright: ignore[reportArgumentType]
    if rule is not None and rule(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if all(u is node or u.target in dropout.SIZES for u in source.users):
            dropout.hand_over(node, source)
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)  # not left to dead-code elimination: dropout counts as impure


def _same_dtype(node: fx.Node, dtype: Any) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    val = value(source)
    return isinstance(val, torch.Tensor) and (dtype is None or val.dtype == dtype)


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _is_full_slice(node: fx.Node) -> bool:
    start, end = _argument(node, 2, "start"), _argument(node, 3, "end")
    step = _argument(node, 4, "step", 1)
    if start not in (0, None) or step != 1:
        return False
    return end is None or (isinstance(end, int) and end >= _HUGE)


def _is_off(node: fx.Node) -> bool:
    return _argument(node, 1, "p") == 0 or _argument(node, 2, "train") is False


def _keeps_kind(node: fx.Node) -> bool:
    """x / 1 and x * 1 are x, but an integer divided is a float."""
    source = node.args[0]
    ours, its = value(node), value(source) if isinstance(source, fx.Node) else None
    return (
        isinstance(ours, torch.Tensor)
        and isinstance(its, torch.Tensor)
        and ours.dtype == its.dtype
        and _argument(node, 1, "other") in (1, 1.0)
    )


_NO_OPS: dict[Callable[..., Any], Callable[[fx.Node], bool]] = {
    ATEN.to.dtype: lambda n: _same_dtype(n, _argument(n, 1, "dtype")),
    ATEN.to.dtype_layout: lambda n: _same_dtype(n, n.kwargs.get("dtype")),
    ATEN.to.device: lambda n: _same_dtype(n, _argument(n, 2, "dtype")),
    ATEN.to.other: lambda n: _same_dtype(n, value(n).dtype if value(n) is not None else None),
    ATEN.type_as.default: lambda n: _same_dtype(n, value(n).dtype),
    ATEN._to_copy.default: lambda n: _same_dtype(n, n.kwargs.get("dtype")),
    ATEN.slice.Tensor: _is_full_slice,
    ATEN.dropout.default: _is_off,
    ATEN.feature_dropout.default: _is_off,
    ATEN.alpha_dropout.default: _is_off,
    ATEN.feature_alpha_dropout.default: _is_off,
    ATEN.native_dropout.default: lambda n: False,
    ATEN.div.Tensor: _keeps_kind,
    ATEN.mul.Tensor: _keeps_kind,
    ATEN.alias.default: lambda n: True,
    ATEN.clone.default: lambda n: (
        not n.kwargs
    ),  # nothing writes in place here, so a copy is the value
    ATEN.detach_.default: lambda n: True,
    ATEN.lift_fresh_copy.default: lambda n: True,
}


def _whole_batch_norm(node: fx.Node) -> None:
    """A batch norm in eval mode as one op; a model that writes in place comes with it in a form of three results."""
    if node.target is not ATEN._native_batch_norm_legit_no_training.default:
        return
    *tensors, momentum, eps = node.args
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
        return
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(
            ATEN.batch_norm.default, (*tensors, False, momentum, eps, True)
        )
    whole.meta = {**node.meta, "val": value(node)[0]}
    for part in list(node.users):
        part.replace_all_uses_with(whole)
        node.graph.erase_node(part)
    node.graph.erase_node(node)


def _unpin_device(node: fx.Node) -> None:
    """`arange(…, device=cpu)` follows the device of a tensor that the graph is given."""
    device = node.kwargs.get("device")
    if not isinstance(device, torch.device):
        return
    anchor = _device_anchor(node)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
    if anchor is not None:
        with node.graph.inserting_before(node):
            kwargs["device"] = node.graph.call_function(getattr, (anchor, "device"))
    node.kwargs = kwargs


def _device_anchor(node: fx.Node) -> fx.Node | None:
    """A tensor before `node` in its graph: an input, else a parameter."""
    before: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.op in ("placeholder", "get_attr") and isinstance(value(other), torch.Tensor):
            before.append(other)
    return before[0] if before else None


def _inline_identities(root: fx.GraphModule) -> None:
    """A module that returns its input (dropout that is off) is not called."""
    for _, module in reversed(list(graphs(root))):
        for node in list(module.graph.nodes):
            if node.op != "call_module":
                continue
            target = module.get_submodule(str(node.target))
            index = _returned_input(target) if isinstance(target, fx.GraphModule) else None
            if index is not None:
                source = node.args[index]
                assert isinstance(source, fx.Node)
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)


def _returned_input(module: fx.GraphModule) -> int | None:
    nodes = list(module.graph.nodes)
    returned = nodes[-1].args[0]
    if any(n.op not in ("placeholder", "output") for n in nodes):
        return None
    inputs = [n for n in nodes if n.op == "placeholder"]
    return inputs.index(returned) if returned in inputs else None


def _drop_uncalled(root: nn.Module) -> None:
    """Modules that no graph calls any more and that hold no parameter leave the tree."""
    called = {
        join(path, str(n.target))
        for path, m in graphs(root)
        for n in m.graph.nodes
        if n.op in ("call_module", "get_attr")
    }
    prefixes = {p[:i] for p in called for i in range(len(p) + 1) if i == len(p) or p[i] == "."}
    for path, module in reversed(list(root.named_modules())):
        if (
            path
            and path not in prefixes
            and not list(module.parameters())
            and not list(module.buffers())
        ):
            parent, _, name = path.rpartition(".")
            root.get_submodule(parent)._modules.pop(name, None)
