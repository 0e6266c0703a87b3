"""From an operator written in the language to a module: an FX graph with named parameters.

The graph is of the same ATen ops as captured models have, so that whatever reads, prints or exports
a captured model takes it too. The parameters stand in submodules of torch.nn under the names that the
operator gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.operators.conv import TokenFilter
from graftc.operators.linear_attention import causal_sum
from graftc.operators.spec import Arguments, Value
from graftc.operators.written import Dim, Given, Number, Setting, Step, Written, chosen_inputs

ATEN = torch.ops.aten

UNARY: Mapping[str, Any] = {
    "silu": ATEN.silu.default,
    "relu": ATEN.relu.default,
    "gelu": ATEN.gelu.default,
    "tanh": ATEN.tanh.default,
    "sigmoid": ATEN.sigmoid.default,
    "elu": ATEN.elu.default,
    "softplus": ATEN.softplus.default,
    "exp": ATEN.exp.default,
    "log": ATEN.log.default,
    "sqrt": ATEN.sqrt.default,
    "rsqrt": ATEN.rsqrt.default,
    "abs": ATEN.abs.default,
    "square": ATEN.square.default,
    "sin": ATEN.sin.default,
    "cos": ATEN.cos.default,
    "neg": ATEN.neg.default,
}
BINARY: Mapping[str, Any] = {
    "add": ATEN.add.Tensor,
    "sub": ATEN.sub.Tensor,
    "mul": ATEN.mul.Tensor,
    "div": ATEN.div.Tensor,
}


class AtLeastFloat32(nn.Module):
    """x in float32, or in its own dtype where that is wider: sums over many tokens overflow in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))


class CausalSum(nn.Module):
    """Σ_{j ≤ i} (q_i · k_j) v_j for every token i; each [batch, tokens, heads, width]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_sum(q, k, v, chunk=64)


def lower(written: Written, arguments: Arguments) -> fx.GraphModule:
    """The module with these arguments; ValueError where they give a size that is none.

    Parameters are drawn by torch.nn's own defaults, in the order in which the operator names them.
    """
    return _Lowering(written, arguments).module()


class _Lowering:
    """The graph as far as it is built: a node for each value."""

    def __init__(self, written: Written, arguments: Arguments) -> None:
        self.written, self.arguments = written, arguments
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[int, fx.Node] = {}
        self.sizes: dict[str, fx.Node] = {}
        self.batch: fx.Node | None = None

    def module(self) -> fx.GraphModule:
        for i, (name, _) in enumerate(self.written.inputs):
            self.values[i] = self.graph.placeholder(name)
        for first, step in self.written.live(self.arguments):
            inputs = [
                v.at(self.arguments) if isinstance(v, Number) else self.values[v]
                for v in chosen_inputs(step, self.arguments)
            ]
            made = (
                _OPS[step.op](self, step, inputs) if step.op in _OPS else self.plain(step, inputs)
            )
            if len(step.shapes) == 1:
                self.values[first] = made
                continue
            for i in range(len(step.shapes)):
                self.values[first + i] = self.graph.call_function(operator.getitem, (made, i))
        results = [self.values[i] for i in self.written.returns]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        made = fx.GraphModule(self.root, self.graph, self.written.name)
        made.graph.eliminate_dead_code()  # parts of a split that nothing reads
        made.graph.lint()
        made.recompile()
        return made

    def plain(self, step: Step, inputs: list[Any]) -> fx.Node:
        if step.op in UNARY:
            return self.call(UNARY[step.op], inputs[0])
        left, right = inputs
        if not isinstance(left, fx.Node):  # a number before a value
            if step.op in ("add", "mul"):
                left, right = right, left
            elif step.op == "sub":
                return self.call(ATEN.rsub.Scalar, right, left)
            else:
                return self.call(ATEN.mul.Tensor, self.call(ATEN.reciprocal.default, right), left)
        return self.call(BINARY[step.op], left, right)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def setting(self, value: Setting) -> Value:
        if isinstance(value, Given):
            return value.at(self.arguments)
        if isinstance(value, Dim):
            return value.at(self.arguments)
        assert not isinstance(value, tuple)
        return value

    def submodule(self, name: str, module: nn.Module, *inputs: Any) -> fx.Node:
        self.root.add_module(name, module)
        return self.graph.call_module(name, inputs)

    def helper(self, name: str, module: nn.Module, *inputs: Any) -> fx.Node:
        """A submodule without parameters, one for all its uses."""
        if not hasattr(self.root, name):
            self.root.add_module(name, module)
        return self.graph.call_module(name, inputs)

    def size(self, dim: Dim) -> Any:
        """A size as a number, or computed from the inputs' sizes where it holds a token count."""
        tokens = dim.names & set(self.written.token_names)
        if not tokens:
            return dim.at(self.arguments)
        (name,) = tokens
        count = dim / Dim.named(name)
        if name not in self.sizes:
            place = next(
                i for i, (_, s) in enumerate(self.written.inputs) if s[0] == Dim.named(name)
            )
            self.sizes[name] = self.call(ATEN.sym_size.int, self.values[place], 1)
        factor = count.at(self.arguments)
        return (
            self.sizes[name] if factor == 1 else self.call(operator.mul, self.sizes[name], factor)
        )

    def shape(self, dims: tuple[Dim, ...]) -> list[Any]:
        if self.batch is None:
            self.batch = self.call(ATEN.sym_size.int, self.values[0], 0)
        return [self.batch, *(self.size(d) for d in dims)]

    def width(self, step: Step) -> int:
        """The last size of an op's result."""
        return step.shapes[0][-1].at(self.arguments)


def _linear(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    into = step.settings["into"]
    assert isinstance(into, Dim)
    bias = bool(step.settings["bias"])
    module = nn.Linear(into.at(low.arguments), low.width(step), bias=bias)
    return low.submodule(str(step.name), module, inputs[0])


def _depthwise_conv(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    channels, taps = low.width(step), low.setting(step.settings["kernel"])
    assert isinstance(taps, int)
    left = taps - 1 if low.setting(step.settings["causal"]) else (taps - 1) // 2
    padded = low.call(ATEN.pad.default, inputs[0], [0, 0, left, taps - 1 - left])
    return low.submodule(str(step.name), TokenFilter(channels, taps), padded)


def _layer_norm(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    width, eps = low.width(step), low.setting(step.settings["eps"])
    if step.name is None:
        return low.call(ATEN.layer_norm.default, inputs[0], [width], None, None, eps)
    return low.submodule(step.name, nn.LayerNorm(width, eps=float(eps or 0)), inputs[0])


def _rms_norm(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    width, eps = low.width(step), low.setting(step.settings["eps"])
    if step.name is None:
        return low.call(ATEN.rms_norm.default, inputs[0], [width], None, eps)
    return low.submodule(step.name, nn.RMSNorm(width, eps=float(eps or 0)), inputs[0])


def _split(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    sizes = [s[-1].at(low.arguments) for s in step.shapes]
    if len(set(sizes)) == 1 and step.settings.get("equal"):
        return low.call(ATEN.chunk.default, inputs[0], len(sizes), -1)
    return low.call(ATEN.split_with_sizes.default, inputs[0], sizes, -1)


def _concat(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    return low.call(ATEN.cat.default, inputs, -1)


def _append(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    return low.call(ATEN.pad.default, inputs[0], [0, 1], "constant", float(inputs[1]))


def _reshape(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    return low.call(ATEN.reshape.default, inputs[0], low.shape(step.shapes[0]))


def _permute(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    axes = step.settings["axes"]
    assert isinstance(axes, tuple)
    return low.call(ATEN.permute.default, inputs[0], [0, *(int(a) + 1 for a in axes)])  # type: ignore[arg-type]


def _transpose(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    axes = step.settings["axes"]
    assert isinstance(axes, tuple)
    return low.call(ATEN.transpose.int, inputs[0], *(int(a) + 1 for a in axes))  # type: ignore[arg-type]


def _repeat(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    times = low.setting(step.settings["times"])
    return low.call(ATEN.repeat_interleave.self_int, inputs[0], times, _axis(low, step))


def _axis(low: _Lowering, step: Step) -> int:
    axis = step.settings["axis"]
    assert isinstance(axis, int)
    return axis + 1  # the batch


def _softmax(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    return low.call(ATEN.softmax.int, inputs[0], _axis(low, step))


def _cumsum(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    return low.call(ATEN.cumsum.default, inputs[0], _axis(low, step))


def _reduce(target: Any) -> Callable[[_Lowering, Step, list[Any]], fx.Node]:
    def made(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
        return low.call(target, inputs[0], [_axis(low, step)], bool(step.settings["keep"]))

    return made


def _activate(low: _Lowering, step: Step, inputs: list[Any]) -> fx.Node:
    x, name = inputs[0], low.setting(step.settings["activation"])
    if name == "gelu_tanh":
        made = low.call(ATEN.gelu.default, x)
        made.kwargs = {"approximate": "tanh"}
        return made
    if name == "relu_squared":
        return low.call(ATEN.square.default, low.call(ATEN.relu.default, x))
    if name == "quick_gelu":
        gate = low.call(ATEN.sigmoid.default, low.call(ATEN.mul.Tensor, x, 1.702))
        return low.call(ATEN.mul.Tensor, x, gate)
    if name not in UNARY:
        raise ValueError(f"{low.written.name}: unknown activation {name!r}")
    return low.call(UNARY[str(name)], x)


_OPS: Mapping[str, Callable[[_Lowering, Step, list[Any]], Any]] = {
    "linear": _linear,
    "depthwise_conv": _depthwise_conv,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "split": _split,
    "concat": _concat,
    "append": _append,
    "reshape": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "repeat": _repeat,
    "softmax": _softmax,
    "cumsum": _cumsum,
    "sum": _reduce(ATEN.sum.dim_IntList),
    "mean": _reduce(ATEN.mean.dim),
    "activate": _activate,
    "matmul": lambda low, step, inputs: low.call(ATEN.matmul.default, *inputs),
    "choose": lambda low, step, inputs: inputs[0],
    "float32": lambda low, step, inputs: low.helper("float32", AtLeastFloat32(), inputs[0]),
    "like": lambda low, step, inputs: low.call(ATEN.type_as.default, *inputs),
    "causal_sum": lambda low, step, inputs: low.helper("causal_sum", CausalSum(), *inputs),
}
