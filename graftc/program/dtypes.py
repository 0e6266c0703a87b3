"""Let a captured graph move to another dtype.

Capture in float32 cannot tell `x.float()` from `x.to(self.dtype)`: both are no-ops and are gone
after normalisation. What is left pinned are values made from constants (a timestep's sines);
where such a value meets a weight, it is cast to the weight's dtype, as every author writes it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from graftc.program.flat import Call, Op, flatten
from graftc.program.ops import CONVS, LINEARS
from graftc.program.program import ATEN, Program, generate_code

_CREATIONS = frozenset(
    getattr(getattr(ATEN, name), overload)
    for name, overload in [
        ("arange", "default"), ("arange", "start"), ("arange", "start_step"), ("zeros", "default"),
        ("ones", "default"), ("full", "default"), ("linspace", "default"), ("scalar_tensor", "default"),
    ]
)  # fmt: skip


def follow_weights(program: Program) -> Program:
    """Cast pinned values to the dtype of the weight they meet (the Program is freshly captured and consumed)."""
    flat = flatten(program)
    calls = {id(c.node): c for c in flat.calls}
    by_path: dict[str, list[Call]] = {}
    for call in calls.values():
        by_path.setdefault(call.path, []).append(call)
    pinned: dict[int, bool] = {}
    touched: set[fx.GraphModule] = set()
    for op in flat.ops:
        data = _data_operand(op)
        if data is not None and pinned.get(data.index) and _is_float(data):
            for call in by_path.get(op.path, ()):
                owner = _cast_at(call, op)
                if owner is not None:
                    touched.add(owner)
            pinned[op.index] = False
            continue
        pinned[op.index] = _is_pinned(op, pinned)
    for module in touched:
        generate_code(module)
    return replace(program, root=program.root)


def _is_pinned(op: Op, pinned: dict[int, bool]) -> bool:
    """Whether a value stays in float32 whatever the weights are."""
    if op.kind != "op":
        return False
    if op.target in _CREATIONS:
        return _is_float(op)
    if op.target is ATEN.to.dtype:
        return _is_float(op)
    return any(pinned.get(o.index, False) for o in op.operands)


def _is_float(op: Op) -> bool:
    return op.tensor is not None and op.tensor.dtype.is_floating_point


def _data_operand(op: Op) -> Op | None:
    if op.kind != "op" or (op.target not in LINEARS and op.target not in CONVS):
        return None
    data, weight = (op.args[1], op.args[2]) if op.target is ATEN.addmm.default else op.args[:2]
    return data if isinstance(weight, Op) and weight.kind == "param" else None


def _cast_at(call: Call, op: Op) -> fx.GraphModule | None:
    """Cast the argument of a leaf's call: the leaf itself stays the layer that it was."""
    inner = call.node.graph.owning_module.get_submodule(str(call.node.target))  # pyright: ignore[reportOptionalMemberAccess]
    if not isinstance(inner, fx.GraphModule) or call.node.op != "call_module":
        return None
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    data = op.node.args[1] if op.target is ATEN.addmm.default else op.node.args[0]
    if data not in placeholders:
        return None
    index = placeholders.index(data)
    source = call.node.args[index]
    if not isinstance(source, fx.Node) or source.target is ATEN.to.dtype:
        return None
    weight = op.node.args[2] if op.target is ATEN.addmm.default else op.node.args[1]
    assert isinstance(weight, fx.Node)
    graph = call.node.graph
    with graph.inserting_before(call.node):
        parameter = graph.get_attr(f"{call.node.target}.{weight.target}")
        dtype = graph.call_function(getattr, (parameter, "dtype"))
        cast = graph.call_function(ATEN.to.dtype, (source, dtype))
    parameter.meta["val"] = weight.meta.get("val")
    cast.meta["val"] = source.meta.get("val")
    call.node.args = (*call.node.args[:index], cast, *call.node.args[index + 1 :])
    return graph.owning_module
