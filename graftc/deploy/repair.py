"""What the exporter writes and a runtime or a checker rejects, put right in the graph.

Each repair is for one form, and says how often it was needed:

- a `Squeeze` of an axis that is not 1 (torch's squeeze leaves such an axis alone, ONNX's may not);
- an `Einsum` of one operand, a transposition; ONNX has no bfloat16 Einsum, so others get casts;
- a mask of one row for all queries, which `Attention` of opset 23 does not broadcast in every runtime;
- casts to the type that a value has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir


def repair(model: ir.Model) -> Counter[str]:
    """Repair `model` in place; returns how often each repair was made."""
    done: Counter[str] = Counter()
    for node in list(model.graph):
        for name, fix in _FIXES.items():
            if node.graph is not None and fix(model.graph, node):
                done[name] += 1
                break
    return done


def _squeeze(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    value, axes = node.inputs[0], node.inputs[1].const_value
    if value is None or value.shape is None or axes is None:
        return False
    shape = value.shape
    wanted = [int(a) for a in axes.numpy().reshape(-1)]
    kept = [a for a in wanted if shape[a] == 1]
    if len(kept) == len(wanted) or any(
        not isinstance(shape[a], int) for a in wanted if a not in kept
    ):
        return False
    if not kept:
        _replace(graph, node, value)
    else:
        axis = _constant(graph, node, f"{node.outputs[0].name}_axes", kept)
        node.replace_input_with(1, axis)
    return True


def _einsum(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Einsum":
        return False
    left, _, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if "," not in left and sorted(left) == sorted(right) and len(set(left)) == len(left):
        source = node.inputs[0]
        made = ir.node(
            "Transpose", [source], {"perm": [left.index(c) for c in right]}, name=node.name
        )
        _take_over(graph, node, made)
        return True
    if any(v is not None and v.dtype == ir.DataType.BFLOAT16 for v in node.inputs):
        _around(graph, node, ir.DataType.BFLOAT16, ir.DataType.FLOAT)
        return True
    return False


def _mask(graph: ir.Graph, node: ir.Node) -> bool:
    """A mask [.., 1, keys] is expanded to [.., queries, keys]."""
    if node.op_type != "Attention" or node.domain or len(node.inputs) < 4:
        return False
    query, mask = node.inputs[0], node.inputs[3]
    if query is None or mask is None or mask.shape is None or mask.shape[-2] != 1:
        return False
    if query.shape is not None and query.shape[-2] == 1:
        return False
    rank = len(mask.shape)
    rows = ir.node("Shape", [query], {"start": 2, "end": 3}, name=f"{node.name}_rows")
    ones = _constant(graph, node, f"{node.outputs[0].name}_one", [1])
    head = [ones] * (rank - 2)
    size = ir.node("Concat", [*head, rows.outputs[0], ones], {"axis": 0}, name=f"{node.name}_size")
    wide = ir.node("Expand", [mask, size.outputs[0]], name=f"{node.name}_mask")
    for made in (rows, size, wide):
        _describe(made, node)
    for made, kind, shape in ((rows, ir.DataType.INT64, [1]), (size, ir.DataType.INT64, [rank])):
        made.outputs[0].type, made.outputs[0].shape = ir.TensorType(kind), ir.Shape(shape)
    out = wide.outputs[0]
    out.type = mask.type
    queries = query.shape[-2] if query.shape is not None else None
    out.shape = ir.Shape([*list(mask.shape)[:-2], queries, mask.shape[-1]])
    graph.insert_before(node, [rows, size, wide])
    node.replace_input_with(3, out)
    return True


def _cast(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype is None:
        return False
    if (
        int(node.attributes["to"].as_int()) != int(node.inputs[0].dtype)
        or node.outputs[0].is_graph_output()
    ):
        return False
    _replace(graph, node, node.inputs[0])
    return True


_FIXES = {
    "squeeze of an axis that is not 1": _squeeze,
    "einsum": _einsum,
    "mask of one row": _mask,
    "cast to the same type": _cast,
}


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Take a node out: whoever used its output uses `value`."""
    old = node.outputs[0]
    if old.is_graph_output():
        made = ir.node("Identity", [value], name=node.name)
        _take_over(graph, node, made)
        return
    ir.convenience.replace_all_uses_with(old, value)
    graph.remove(node, safe=True)


def _take_over(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, with its names, types and notes."""
    _describe(new, old)
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def _describe(new: ir.Node, old: ir.Node) -> None:
    new.metadata_props.update(old.metadata_props)
    new.version = old.version


def _around(graph: ir.Graph, node: ir.Node, narrow: ir.DataType, wide: ir.DataType) -> None:
    """Casts before and after a node that does not take `narrow`."""
    for i, value in enumerate(node.inputs):
        if value is not None and value.dtype == narrow:
            up = ir.node("Cast", [value], {"to": int(wide)}, name=f"{node.name}_up{i}")
            up.outputs[0].type, up.outputs[0].shape = ir.TensorType(wide), value.shape
            _describe(up, node)
            graph.insert_before(node, up)
            node.replace_input_with(i, up.outputs[0])
    out = node.outputs[0]
    down = ir.node("Cast", [out], {"to": int(narrow)}, name=f"{node.name}_down")
    result = down.outputs[0]
    result.type, result.shape = ir.TensorType(narrow), out.shape
    _describe(down, node)
    users: Iterable[Any] = [u for u in out.uses() if u.node is not down]
    for use in list(users):
        use.node.replace_input_with(use.idx, result)
    out.type = ir.TensorType(wide)
    name = out.name
    out.name, result.name = f"{name}_wide", name
    for i, value in enumerate(graph.outputs):
        if value is out:
            graph.outputs[i] = result
    graph.insert_after(node, down)


def _constant(graph: ir.Graph, node: ir.Node, name: str, numbers: list[int]) -> ir.Value:
    import numpy

    tensor = ir.tensor(numpy.asarray(numbers, numpy.int64), name=name)
    made = ir.node("Constant", [], {"value": tensor}, name=name)
    made.outputs[0].type, made.outputs[0].shape = (
        ir.TensorType(ir.DataType.INT64),
        ir.Shape([len(numbers)]),
    )
    made.outputs[0].const_value = tensor
    _describe(made, node)
    graph.insert_before(node, made)
    return made.outputs[0]
