"""The parts of a site: q, k, v, out, up, gate, down as affine maps, whatever form they are stored in.

A projection may be fused with others, interleaved by head, or stored transposed. Instead of a
table of layouts we run the ops between the linear and the attention on the *numbers of the
linear's output features*: where each number arrives tells which row is which head's.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graftc.diagnostics import fail
from graftc.program.analysis import Analysis
from graftc.program.evaluate import CannotEvaluateError, data_operands, evaluate
from graftc.program.flat import Op, strip
from graftc.program.joint import streams_of
from graftc.program.ops import MOVEMENTS
from graftc.program.program import ATEN, Program, size_hint, tensor_of
from graftc.program.qk import Norm
from graftc.program.roles import Attention

_NO_HOPS: Mapping[int, Op] = {}


@dataclass(frozen=True)
class PartRef:
    """Where a part stands: parameters, the rows (or columns) that are its own in head-major order.

    None for rows or columns means all, in order. `transposed`: stored [in, out] (Conv1D). `plus` is added to
    the weight: a norm may be stored as what its scale differs from one by. `identity`: no parameter, but the
    identity of this width. `bias_rows`: the piece of `bias` that is meant, before `rows`. `computed`: the op that makes the
    weight of parameters alone (weight_norm, spectral_norm); `weight` is then the first of them.
    """

    weight: str
    bias: str | None
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    transposed: bool = False
    plus: float = 0.0
    identity: int = 0
    bias_rows: tuple[int, ...] | None = None
    computed: Op | None = None

    def tensors(self, program: Program) -> tuple[Tensor, Tensor | None]:
        """(weight [out, in], bias [out] or None), copied."""
        if self.identity:
            like = next(program.root.parameters())
            return torch.eye(self.identity, dtype=like.dtype, device=like.device), None
        weight = self._stored(program)
        weight = weight.t() if self.transposed else weight
        bias = program.root.get_parameter(self.bias).detach() if self.bias else None
        if bias is not None and self.bias_rows is not None:
            bias = bias[torch.tensor(self.bias_rows, device=bias.device)]
        if self.rows is not None:
            index = torch.tensor(self.rows, device=weight.device)
            weight = weight[index]
            bias = bias[index] if bias is not None else None
        if self.columns is not None:
            weight = weight[:, torch.tensor(self.columns, device=weight.device)]
        return weight + self.plus, bias

    def _stored(self, program: Program) -> Tensor:
        if self.computed is None:
            return program.root.get_parameter(self.weight).detach()
        with torch.no_grad():
            try:
                return evaluate(self.computed, {}, parameters=lambda n: tensor_of(program, n))
            except CannotEvaluateError:  # on the meta device
                like = self.computed.tensor
                sizes = [size_hint(s) for s in like.shape]
                return torch.empty(sizes, dtype=like.dtype, device="meta")


def part_refs(analysis: Analysis, path: str) -> Mapping[str, PartRef | str]:
    """Part name → where it stands, or why it is no affine map (a sentence).

    An attention has q, k, v, out; an MLP up, down and, where gated, gate; a linear its map.
    """
    if path in analysis.attentions:
        a = analysis.attentions[path]
        found: dict[str, PartRef | str] = {}
        hops = _hops(a)
        for name, linears, end in (("q", a.q, a.query), ("k", a.k, a.key), ("v", a.v, a.value)):
            if len(linears) != 1:
                found[name] = f"{name} comes from {len(linears)} linears"
            else:
                found[name] = _rows_of(linears[0], end, hops)
        for name, routes, end in (("q", a.q_routes, a.query), ("k", a.k_routes, a.key)):
            if len(routes) == 1 and (norm := routes[0].norm) is not None:
                found |= _norm_part(f"{name}_norm", norm, end, hops)
        if a.complete and not a.outs:
            found["out"] = _identity(a)
        elif a.out is None:
            found["out"] = (
                f"{len(a.outs)} linears follow the attention"
                if a.complete
                else "no linear follows the attention"
            )
        else:
            found["out"] = _columns_of(a, a.out)
        return {**found, **_of_streams(analysis, path)}
    if path in analysis.mlps:
        m = analysis.mlps[path]
        found = {"up": _rows_of(m.up, m.activation), "down": _whole(m.down)}
        if m.gate is not None:
            # down(act(gate(x)) · up(x)): the activated branch is the gate, the other one is up.
            product = next(u for u in m.activation.users if u.target is ATEN.mul.Tensor)
            other = next(o for o in product.args[:2] if o is not m.activation)
            found["gate"] = _rows_of(m.gate, m.activation)
            found["up"] = _rows_of(m.up, other)
        return found
    site = analysis.by_path.get(path)
    if site is not None and site.role == "norm":
        return {"norm": _leaf(analysis, path)}
    return _of_linear(analysis, path)


def _of_linear(analysis: Analysis, path: str) -> Mapping[str, PartRef | str]:
    """`map`: a linear site itself; nothing for a site of another role."""
    if not any(s.path == path and s.role == "linear" for s in analysis.sites):
        return {}
    graph = analysis.program.module(path)
    assert isinstance(graph, fx.GraphModule)
    transposed = any(n.target is ATEN.addmm.default for n in graph.graph.nodes)
    names = {p.ndim: f"{path}.{n}" for n, p in graph.named_parameters()}
    return {"map": PartRef(names[2], names.get(1), transposed=transposed)}


def _leaf(analysis: Analysis, path: str) -> PartRef | str:
    """The weight (and bias) of a norm, a vector each."""
    names = dict(analysis.program.module(path).named_parameters(recurse=False))
    if "weight" not in names:
        return "it has no weight of its own"
    bias = f"{path}.bias" if "bias" in names else None
    return PartRef(f"{path}.weight", bias)


def _of_streams(analysis: Analysis, path: str) -> Mapping[str, PartRef | str]:
    """The parts of each stream of a joint attention: `q_1`, `q_2`, …, `out_1`, `q_norm_1`, …"""
    a, call = analysis.attentions[path], analysis.flat.first_calls[path]
    streams = streams_of(a, call) if a.kind == "joint_attention" else "one stream"
    if isinstance(streams, str):
        return {}
    found: dict[str, PartRef | str] = {}
    hops = _hops(a)
    for i, stream in enumerate(streams, 1):
        for name, linear, end in (
            ("q", stream.q, a.query),
            ("k", stream.k, a.key),
            ("v", stream.v, a.value),
        ):
            found[f"{name}_{i}"] = _rows_of(linear, end, hops)
        if stream.out is not None:
            found[f"out_{i}"] = _columns_of(a, stream.out)
        for name, norm, end in zip(
            ("q_norm", "k_norm"), stream.norms, (a.query, a.key), strict=True
        ):
            if norm is not None:
                found |= _norm_part(f"{name}_{i}", norm, end, hops)
    return found


def _hops(a: Attention) -> dict[int, Op]:
    """Ops after which a norm or a factor stands, which leaves each feature where it is."""
    return {i: o for r in (*a.q_routes, *a.k_routes) for i, o in r.hops.items()}


def _norm_part(name: str, norm: Norm, end: Op, hops: Mapping[int, Op]) -> dict[str, PartRef | str]:
    """The scale and shift of a norm of q or k, in the order of the features that it is over; nothing without a scale."""
    if norm.weight is None:
        return {}
    bias = norm.bias.fqn if norm.bias is not None else None
    part = PartRef(norm.weight.fqn, bias, plus=norm.plus)
    if norm.width == size_hint(end.tensor.shape[-1]):
        return {name: part}
    moved = _arrived(norm.end, end, hops)
    if isinstance(moved, str):
        return {name: moved}
    rows = tuple(dict.fromkeys(moved.reshape(-1).tolist()))
    return {name: part if rows == tuple(range(norm.width)) else replace(part, rows=rows)}


def _identity(a: Attention) -> PartRef | str:
    """The identity, where no linear follows the attention."""
    width = size_hint(a.query.tensor.shape[-3]) * size_hint(a.value.tensor.shape[-1])
    whole = len(a.query.tensor.shape) == 4 and a.form == "softmax"
    return PartRef("", None, identity=width) if whole else "no linear follows the attention"


def _whole(linear: Op) -> PartRef | str:
    return _ref(linear, None, None)


def _ref(
    linear: Op, rows: tuple[int, ...] | None, columns: tuple[int, ...] | None
) -> PartRef | str:
    conv1d = linear.target is ATEN.addmm.default
    weight = linear.args[2] if conv1d else linear.args[1]
    bias = linear.args[0] if conv1d else linear.argument(2, "bias")
    if weight.kind != "param":
        made_of = _parameters_of(weight)
        if not made_of or (bias is not None and bias.kind != "param"):
            return "the linear's weight is computed of the inputs"
        name = bias.fqn if bias is not None else None
        return PartRef(made_of[0].fqn, name, rows, columns, conv1d, computed=weight)
    if bias is None or bias.kind == "param":
        name = bias.fqn if bias is not None else None
        return PartRef(weight.fqn, name, rows, columns, conv1d)
    made = _piece(bias)
    if made is None:
        return "the linear's bias is computed, not a parameter"
    return PartRef(weight.fqn, made[0].fqn, rows, columns, conv1d, bias_rows=made[1])


def _parameters_of(value: Op) -> list[Op]:
    """The parameters that a value is computed of; none where something else is read too."""
    found: list[Op] = []
    stack, seen = [value], set[int]()
    while stack:
        op = stack.pop()
        if op.index in seen:
            continue
        seen.add(op.index)
        if op.kind == "param":
            found.append(op)
        elif op.kind != "op":
            return []
        stack += data_operands(op)
    return sorted(found, key=lambda o: o.index)


def _piece(value: Op) -> tuple[Op, tuple[int, ...]] | None:
    """(parameter, which of its numbers) where a vector is cut out of one, or out of several put together.

    (torch.nn.functional.multi_head_attention_forward puts the biases of q, k and v together.)
    """
    params: list[Op] = []
    stack = [value]
    while stack:
        op = stack.pop()
        if op.kind == "param":
            params.append(op)
        elif op.kind == "op" and (op.target is ATEN.cat.default or op is not strip(op)):
            stack += data_operands(op)
        else:
            return None
    given: dict[int, Any] = {}
    start = 0
    for op in params:
        size = size_hint(op.tensor.shape[0])
        given[op.index] = torch.arange(start, start + size)
        start += size
    of = {n: (op, i) for op in params for i, n in enumerate(given[op.index].tolist())}
    found = [of[n] for n in evaluate(value, given).tolist()]
    owners = {op.index for op, _ in found}
    return (found[0][0], tuple(i for _, i in found)) if len(owners) == 1 else None


def _rows_of(linear: Op, end: Op, hops: Mapping[int, Op] = _NO_HOPS) -> PartRef | str:
    """The rows of `linear` that arrive at `end`, in the order (head, feature)."""
    moved = _arrived(linear, end, hops)
    if isinstance(moved, str):
        return moved
    features = size_hint(linear.tensor.shape[-1])
    # Batch and heads may share a dimension (nn.MultiheadAttention): each row once.
    rows = tuple(dict.fromkeys(moved.reshape(-1).tolist()))
    return _ref(linear, None if rows == tuple(range(features)) else rows, None)


def _arrived(linear: Op, end: Op, hops: Mapping[int, Op] = _NO_HOPS) -> Any:
    """The numbers of the features of `linear` where they arrive on the way to `end`, batch and tokens of size 1."""
    features = size_hint(linear.tensor.shape[-1])
    path = _movements(linear, end, hops)
    if isinstance(path, str):
        return path
    shape = [size_hint(s) for s in linear.tensor.shape]
    values: dict[int, Any] = {linear.index: torch.arange(features).expand(*shape[:-1], features)}
    last = linear
    for op in path:
        hop = hops.get(last.index) is op
        values[op.index] = values[last.index] if hop else _evaluate(op, values)
        last = op
    moved = values[last.index]
    for i in range(moved.ndim):  # the batch, the tokens: the same numbers everywhere
        first = moved.narrow(i, 0, 1)
        if moved.shape[i] > 1 and bool((moved == first).all()):
            moved = first
    return moved


def _columns_of(a: Attention, linear: Op) -> PartRef | str:
    """The columns of the output projection, in the order (head, feature) of the attention's result."""
    start = a.result
    shape = [size_hint(s) for s in start.tensor.shape]
    if len(shape) != 4:
        return _whole(linear)
    if a.form == "softmax":  # [batch, heads, tokens, head_dim]
        own = (1, shape[-3], 1, shape[-1])
    else:  # heads and features lie where they lie in q
        moved = _arrived(a.q[0], a.query)
        if isinstance(moved, str):
            return moved
        own = tuple(moved.shape)
    features = prod(own)
    numbers = torch.arange(features).view(own).expand(shape)
    source = linear.args[1] if linear.target is ATEN.addmm.default else linear.args[0]
    path = _movements(start, source)
    if isinstance(path, str):
        return path
    values: dict[int, Any] = {start.index: numbers}
    for op in path:
        values[op.index] = _evaluate(op, values)
    arrived = values[source.index].reshape(-1, features)[0].tolist()
    if arrived == list(range(features)):
        return _ref(linear, None, None)
    columns = [0] * len(arrived)
    for position, number in enumerate(arrived):
        columns[number] = position
    return _ref(linear, None, tuple(columns))


def _movements(start: Op, end: Op, hops: Mapping[int, Op] = _NO_HOPS) -> list[Op] | str:
    """The movement ops from `start` on the way to `end`, up to the first op that computes and is no hop."""
    on_way = _between(start, end)
    found: list[Op] = []
    current = start
    while current is not end:
        if current.index in hops:
            current = hops[current.index]
            found.append(current)
            continue
        nexts = [u for u in current.users if u.index in on_way or u is end]
        movements = [u for u in nexts if u.target in MOVEMENTS or u.target is operator.getitem]
        if len(nexts) != 1 or not movements:
            if found or nexts:
                break  # rotary, a norm or a scale follows: the part is the map before it
            return f"no path of movements from {start.path}"
        current = movements[0]
        found.append(current)
    return found


def _between(start: Op, end: Op) -> set[int]:
    """Indices of ops that lie on a path from start to end."""
    memo: dict[int, bool] = {start.index: True}

    def reaches(op: Op) -> bool:
        if op.index not in memo:
            # Every operand is looked at: `memo` is the answer, not this one value.
            ways = [
                op.index > start.index and reaches(o)
                for o in op.operands
                if op.target is not ATEN.sym_size.int
            ]
            memo[op.index] = any(ways)
        return memo[op.index]

    reaches(end)
    return {i for i, yes in memo.items() if yes}


def _evaluate(op: Op, values: Mapping[int, Any]) -> Any:
    """Run one movement op on numbers, sizes at the example's values."""

    def concrete(value: Any) -> Any:
        if isinstance(value, Op):
            if value.index in values:
                return values[value.index]
            return _size(value)
        if isinstance(value, (tuple, list)):
            return [concrete(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    if op.target in (ATEN.to.dtype, ATEN.type_as.default, ATEN.dropout.default):
        return concrete(op.args[0])
    args = [concrete(a) for a in op.args]
    # The numbers are expanded, which a view need not be able to take apart.
    target = ATEN.reshape.default if op.target is ATEN.view.default else op.target
    return target(*args, **{k: concrete(v) for k, v in op.kwargs.items()})


def _size(op: Op) -> int:
    val = op.node.meta.get("val")
    if isinstance(val, (int, torch.SymInt)):
        return size_hint(val)
    fail("G254", "an operand of a movement is no size", site=f"{op.path} ({op.target})")


def affine(
    program: Program, refs: Mapping[str, PartRef | str], name: str, site: str
) -> tuple[Tensor, Tensor | None]:
    """The tensors of a part; a GraftError that names the op where it is not affine or not there."""
    ref = refs.get(name)
    if isinstance(ref, PartRef):
        return ref.tensors(program)
    if ref is None:
        fail(
            "G255",
            f"{site} has no part `{name}`",
            site=site,
            wanted=", ".join(refs) or "a site with parts",
            found=name,
        )
    fail("G256", f"part `{name}` of {site} is not an affine map: {ref}", site=site)


__all__ = ["PartRef", "affine", "part_refs"]
