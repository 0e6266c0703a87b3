"""Capture of cut values as graph outputs, and the region of a cut as a module of its own.

A package's forwards are straight-line, so `fx.Tracer` with every child as a leaf reads one level
exactly. `capture_graph` rewires only the levels on the way to a cut and drops what comes after the
last wanted value; there are no hooks, so the result compiles with `fullgraph=True`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from graftc.diagnostics import fail, nearest
from graftc.distillation.gates import batch_first, gate_after
from graftc.distillation.targets import Cut, CutInput


def capture_graph(
    module: nn.Module, cuts: Sequence[Cut], *, outputs: bool = True, result: bool = False
) -> fx.GraphModule:
    """A module with `module`'s parameters whose forward returns the values of `cuts`.

    `forward(**inputs)` takes what `module` takes and returns a tuple with one entry a cut:
    `(input, …, gate, output)`, tensors in the order of `cut.inputs`, the gate where the cut has one.
    Without `outputs`, the inputs alone. Nothing after the last wanted value is computed; with `result`
    all is, and it returns `(values, what the model returns)`. Raises GraftError where a cut names a call that the model does not make (G510),
    makes more than once (G511), or a value that is no tensor (G512), where a forward cannot be
    read (G513), or where no gate follows a cut that asks for one (G552).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> captured = capture_graph(net, [Cut("", (CutInput("x", "1", 0),), "1")])
    >>> [[tuple(v.shape) for v in values] for values in captured(torch.ones(4, 2))]
    [[(4, 3), (4, 3)]]
    >>> [name for name, _ in captured.named_children()]
    ['0', '1']
    """
    return _level(module, "", list(cuts), keep_result=result, nested=True, outputs=outputs)


def extract(module: nn.Module, cut: Cut) -> nn.Module:
    """The region of a cut, called with the cut's inputs by position; parameters are shared.

    Where the region is one call that takes just these inputs, it is the submodule itself. Raises
    GraftError as `capture_graph`, and where the region uses a value that comes from outside it
    and is not among its inputs (G514).

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> extract(net, Cut("", (CutInput("x", "0", 0),), "0")) is net[0]
    True
    >>> region = extract(net, Cut("", (CutInput("x", "1", 0),), "2"))
    >>> [name for name, _ in region.named_parameters()]
    ['2.weight', '2.bias']
    """
    owner = _submodule(module, cut.graph)
    graph = _trace(owner, cut.graph)
    inputs = [_argument(graph, owner, cut.graph, given) for given in cut.inputs]
    output = _call(graph, cut.graph, cut.output)
    inside = _between(inputs, output, cut)
    calls_once = inside == [output] and list(output.args) == inputs and not output.kwargs
    if calls_once and not _returns_several(output):
        return _submodule(module, cut.output)
    region = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for given, node in zip(cut.inputs, inputs, strict=True):
        copied[node] = region.placeholder(given.name)
    for node in inside:
        copied[node] = region.node_copy(node, copied.__getitem__)
    result = copied[output]
    if _returns_several(output):
        result = region.call_function(side_by_side, (result,))
    region.output(result)
    return _graph_module(owner, region, "Region")


def passed_by_position(module: nn.Module, cut: Cut) -> tuple[str | None, ...] | None:
    """Which of the cut's inputs each positional argument of its call is; None for one that is no input of the cut.

    None in all where the region is more than one call. Raises GraftError as `extract`.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> passed_by_position(net, Cut("", (CutInput("x", "0", 0),), "0"))
    ('x',)
    >>> passed_by_position(net, Cut("", (CutInput("x", "0", 0),), "1")) is None
    True
    """
    if any(given.call != cut.output for given in cut.inputs):
        return None
    owner = _submodule(module, cut.graph)
    graph = _trace(owner, cut.graph)
    names = {_argument(graph, owner, cut.graph, given): given.name for given in cut.inputs}
    call = _call(graph, cut.graph, cut.output)
    return tuple(names.get(a) if isinstance(a, fx.Node) else None for a in call.args)


def with_all_inputs(module: nn.Module, cut: Cut) -> Cut:
    """The cut with the values that its region takes from outside beside its inputs: a mask that the student's call has not.

    A value that no call of the region takes as it is cannot be named, and is left out. Raises GraftError as `capture_graph`.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.mix = nn.Bilinear(2, 2, 2)
    ...     def forward(self, x, c):
    ...         return x + self.mix(x, c)
    >>> [i.name for i in with_all_inputs(Block(), Cut("", (CutInput("x", "mix", 0),), "mix")).inputs]
    ['x', 'c']
    """
    owner = _submodule(module, cut.graph)
    graph = _trace(owner, cut.graph)
    inputs = [_argument(graph, owner, cut.graph, given) for given in cut.inputs]
    inside, lacking = _reached(inputs, _call(graph, cut.graph, cut.output))
    found = list(cut.inputs)
    for node in lacking:
        for user in (u for u in node.users if u in inside and u.op == "call_module"):
            places = [*enumerate(user.args), *user.kwargs.items()]
            where = next((place for place, value in places if value is node), None)
            if where is not None and node.name not in {i.name for i in found}:
                found.append(CutInput(node.name, _join(cut.graph, user.target), where))
    return replace(cut, inputs=tuple(found))


def calls_of(module: nn.Module, path: str = "") -> list[str]:
    """Full paths of the modules that the forward of the module at `path` calls, in order, each once.

    Raises GraftError (G513) where it cannot be read.

    >>> calls_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    ['0', '1']
    """
    graph = _trace(_submodule(module, path), path)
    calls = [_join(path, node.target) for node in graph.nodes if node.op == "call_module"]
    return list(dict.fromkeys(calls))


def side_by_side(value: Any) -> Any:
    """The tensors that a region returns (the two streams of a joint attention) as one, [batch, …]."""
    if not isinstance(value, (tuple, list)):
        return value
    return torch.cat([part.flatten(1) for part in value], dim=1)


def _returns_several(call: fx.Node) -> bool:
    """Whether the parts of what a call returns are taken apart."""
    return any(user.target is operator.getitem for user in call.users)


def _between(inputs: list[fx.Node], output: fx.Node, cut: Cut) -> list[fx.Node]:
    """The nodes that make `output` from `inputs`, in the graph's order. Raises GraftError (G514)."""
    inside, lacking = _reached(inputs, output)
    for node in lacking:
        fail("G514", f"the region of `{cut.output}` uses `{node.name}`, which comes from outside",
             site=cut.graph or "the root graph",
             wanted=", ".join(i.name for i in cut.inputs), found=node.name,
             help="name the value among the cut's inputs")  # fmt: skip
    return [node for node in output.graph.nodes if node in inside]


def _reached(inputs: list[fx.Node], output: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes that make `output` from `inputs`, and the values from outside that they need too."""
    inside: set[fx.Node] = set()
    lacking: list[fx.Node] = []
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node in inside or node in inputs or node in lacking:
            continue
        if node.op == "placeholder":
            lacking.append(node)
            continue
        inside.add(node)
        waiting.extend(node.all_input_nodes)
    return inside, lacking


def _level(
    module: nn.Module,
    path: str,
    cuts: list[Cut],
    *,
    keep_result: bool,
    nested: bool,
    outputs: bool,
) -> fx.GraphModule:
    """`module` rebuilt to return the values of `cuts`, flat, then its own result if that is kept.

    `nested` (the root alone) returns one tuple a cut instead.
    """
    graph = _trace(module, path)
    below: dict[fx.Node, list[Cut]] = {}
    for cut in cuts:
        if cut.graph != path:
            below.setdefault(_call_above(graph, path, cut.graph), []).append(cut)

    # A child that holds cuts returns their values first and its own result last, so that the
    # positions of the values stand before it is known whether the result is needed.
    values: dict[Cut, list[fx.Node]] = {}
    result: dict[fx.Node, fx.Node] = {}
    for call, inner in below.items():
        offsets = [len(cut.inputs) + ((cut.gate + 1) if outputs else 0) for cut in inner]
        with graph.inserting_after(call):
            own = graph.call_function(operator.getitem, (call, sum(offsets)))
        call.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
        result[call] = own
        start = 0
        for cut, size in zip(inner, offsets, strict=True):
            with graph.inserting_after(call):
                values[cut] = [
                    graph.call_function(operator.getitem, (call, start + i)) for i in range(size)
                ]
            start += size
    for cut in cuts:
        if cut.graph == path:
            values[cut] = [_argument(graph, module, path, given) for given in cut.inputs]
            if not outputs:
                continue
            output = _call(graph, path, cut.output)
            last = result.get(output, output)
            if cut.gate:
                gate = gate_after(last, cut.output)
                after = max(gate, last)  # the later of the two in the graph
                with graph.inserting_after(after):
                    values[cut].append(graph.call_function(batch_first, (gate, last)))
            if _returns_several(last):
                with graph.inserting_after(last):
                    last = graph.call_function(side_by_side, (last,))
            values[cut].append(last)

    end = next(node for node in reversed(graph.nodes) if node.op == "output")
    if nested:
        told = tuple(tuple(values[cut]) for cut in cuts)
        end.args = ((told, end.args[0]) if keep_result else told,)
    else:
        flat = [value for cut in cuts for value in values[cut]]
        end.args = ((*flat, end.args[0]) if keep_result else tuple(flat),)
    _remove_unused(graph)

    rebuilt = _graph_module(module, graph, f"Capture{type(module).__name__}")
    for call, inner in below.items():
        child = _submodule(module, str(call.target))
        kept = bool(result[call].users)
        level = _level(
            child, _join(path, call.target), inner, keep_result=kept, nested=False, outputs=outputs
        )
        rebuilt.add_submodule(str(call.target), level)
    return rebuilt


def _remove_unused(graph: fx.Graph) -> None:
    """Erase what no output needs. fx's own pass keeps calls of modules it cannot see into."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


class _OneLevel(fx.Tracer):
    """Records calls of children and never enters them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module, path: str) -> fx.Graph:
    try:
        return _OneLevel().trace(module)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail("G513", f"the forward of {type(module).__name__} cannot be read as a graph: {first}",
             site=path or "the root module",
             help="a package's forward is straight-line code or a loop over blocks")  # fmt: skip


def _graph_module(owner: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    made = fx.GraphModule(owner, graph, name)
    # Tensors that the forward makes itself were parked on the traced module: give it back clean.
    for attribute in [a for a in vars(owner) if a.startswith("_tensor_constant")]:
        delattr(owner, attribute)
    return made


def _join(path: str, target: Any) -> str:
    return f"{path}.{target}" if path else str(target)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in module.named_modules()]
        near = nearest(path, names)
        fail("G510", f"the model has no module `{path}`", site=path,
             help=f"did you mean `{near}`?" if near else None)  # fmt: skip


def _call(graph: fx.Graph, path: str, target: str) -> fx.Node:
    """The one call of the module `target` (a full path) in the graph at `path`."""
    calls = [n for n in graph.nodes if n.op == "call_module" and _join(path, n.target) == target]
    where = f"the graph of `{path}`" if path else "the root graph"
    if not calls:
        made = [_join(path, n.target) for n in graph.nodes if n.op == "call_module"]
        near = nearest(target, made)
        fail("G510", f"{where} makes no call of `{target}`", site=target,
             found=_some(made), help=f"did you mean `{near}`?" if near else None)  # fmt: skip
    if len(calls) > 1:
        fail("G511", f"{where} calls `{target}` {len(calls)} times", site=target,
             wanted="one call, so that the cut is one place", found=f"{len(calls)} calls")  # fmt: skip
    return calls[0]


def _call_above(graph: fx.Graph, path: str, inner: str) -> fx.Node:
    """The call, in the graph at `path`, of the module that is or holds the module `inner`."""
    for node in graph.nodes:
        if node.op == "call_module":
            full = _join(path, node.target)
            if inner == full or inner.startswith(full + "."):
                return _call(graph, path, full)
    return _call(graph, path, inner)


def _argument(graph: fx.Graph, owner: nn.Module, path: str, given: CutInput) -> fx.Node:
    """The node of the value that a call takes as one of its arguments, positional or by keyword."""
    call = _call(graph, path, given.call)
    names = list(inspect.signature(owner.get_submodule(str(call.target)).forward).parameters)
    place, name = given.argument, given.argument
    if isinstance(place, int):
        name = names[place] if place < len(names) else None
    else:
        place = names.index(place) if place in names else None
    value: Any = None
    if isinstance(place, int) and place < len(call.args):
        value = call.args[place]
    elif name is not None:
        value = call.kwargs.get(str(name))
    if not isinstance(value, fx.Node):
        fail("G512", f"argument {given.argument} of the call of `{given.call}` is no tensor",
             site=given.call, wanted=f"a tensor, for the input `{given.name}`",
             found=repr(value))  # fmt: skip
    return value


def _some(names: Iterable[str], limit: int = 6) -> str:
    """A list short enough for one line."""
    listed = list(names)
    more = f", … ({len(listed)})" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more or "no calls"
