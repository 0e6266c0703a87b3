"""Capture: an nn.Module with example inputs becomes a Program.

`torch.export` traces the module, `unflatten` gives back its tree of calls; what comes out
of here are plain `fx.GraphModule`s (an `InterpreterModule` keeps running its old graph
under `torch.compile` after an edit).
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import InterpreterModule

from graftc.diagnostics import GraftError
from graftc.program import dropout
from graftc.program.dropout import Lines
from graftc.program.dtypes import follow_weights
from graftc.program.export import Exported, export
from graftc.program.fixed import make_constant
from graftc.program.model import USER_MODULE, Model
from graftc.program.normalise import normalise
from graftc.program.outline import outline
from graftc.program.program import (
    Facts,
    Outputs,
    Port,
    Program,
    set_graph,
    size_hint,
    structure_hash,
    value,
)
from graftc.program.repeats import NotShared, expand
from graftc.program.saved import Saved
from graftc.program.traces import sizes_told
from graftc.program.unsupported import check_supported


def capture(model: Model) -> Program:
    """The normalised Program of a model, in the mode (train or eval) that its module is in.

    Raises GraftError, with the user's own line, where torch.export cannot trace it.

    >>> p = capture(Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"input": torch.zeros(2, 4)}))
    >>> [n.target for n in p.root.graph.nodes if n.op == "call_module"]
    ['0', '1']
    """
    check_supported(model)
    return _shared_or_not(model)


def trained(model: Model) -> tuple[Program, Lines]:
    """The Program of a model whose module is in train mode, its dropouts noted beside the graphs (`program.dropout`),
    and the lines of those that could not be noted.

    What else is random stays in the graphs, for `program.modes` to compare. Raises GraftError where it cannot be traced.
    """
    lost: Lines = Counter()
    return _shared_or_not(model, lost), lost


def _shared_or_not(model: Model, lost: Lines | None = None) -> Program:
    try:
        return _capture(model, True, lost)
    except (NotShared, GraftError):  # then the model's own error is told, not one of sharing
        return _capture(model, False, lost)


def _capture(model: Model, share: bool, lost: Lines | None) -> Program:
    inputs = dict(model.inputs.items())
    dynamic, notes = _dynamic_dimensions(model)
    inputs = _at_least_two(inputs, dynamic)
    values = {n: inputs[n] for n in model.fixed}
    inputs |= {n: v.to(_device(model, v)) for n, v in values.items()}
    traced = export(model.module, inputs, dynamic, share, values, random=lost is not None)
    with sizes_told(traced.program.graph_module):
        return _program(model, inputs, traced, notes, lost)


def _program(
    model: Model, inputs: dict[str, Any], traced: Exported, notes: list[str], lost: Lines | None
) -> Program:
    values = {n: inputs[n] for n in model.fixed}
    exported, dynamic = traced.program, traced.dynamic
    notes = [*notes, *traced.notes]
    _forget_values(exported, model.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tree = torch.export.unflatten(exported)
    root = _plain(tree, {})
    assert isinstance(root, fx.GraphModule)
    expand(root, traced.blocks, lambda module: _plain(module, {}))
    _bind(root, model.module)
    make_constant(root, {n: inputs[n] for n in values})
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    dropped = _drop_constant_inputs(root)
    program = Program(
        root=root,
        inputs=_ports(root, dynamic, model),
        outputs=_outputs(exported, model.module),
        facts=Facts(
            mode="train" if model.module.training else "eval",
            dtype=str(_model_dtype(model.module)).removeprefix("torch."),
            dynamic={
                d: int(tensors[k].shape[i]) for k, dims in dynamic.items() for i, d in dims.items()
            },
            absent=tuple(dict.fromkeys([*_absent(model), *values, *dropped])),
            constants={k: v for k, v in inputs.items() if isinstance(v, (bool, int, float, str))},
            notes=tuple(notes),
            warnings=traced.warnings,
            grid=model.grid,
            streams=model.stream_tokens,
        ),
        classes={path: _class_name(m) for path, m in model.module.named_modules()},
    )
    found = dropout.note(program.root) if lost is not None else Counter[str]()
    root = normalise(program.root)
    found -= dropout.lines(root) if found else found
    _share(root, model.module)
    whole = outline(follow_weights(replace(program, root=root)))
    if lost is not None:
        lost.update(found)
    return whole


def _dynamic_dimensions(model: Model) -> tuple[dict[str, dict[int, str]], list[str]]:
    if model.dynamic or isinstance(model.module, Saved):
        return {k: dict(v) for k, v in model.dynamic.items()}, []
    tensors = {k: v for k, v in model.inputs.items() if isinstance(v, torch.Tensor) and v.ndim}
    sizes = {int(v.shape[0]) for v in tensors.values()}
    if model.fixed:
        return {}, [
            f"{', '.join(model.fixed)} is fixed at the example's values, and every size with it"
        ]
    if len(sizes) != 1:
        return {}, [
            f"the batch is fixed: dimension 0 of the inputs is {sorted(sizes)}, not one size"
        ]
    return {k: {0: "batch"} for k in tensors}, []


def _at_least_two(
    inputs: dict[str, Any], dynamic: Mapping[str, Mapping[int, str]]
) -> dict[str, Any]:
    """torch.export specialises a dynamic dimension of size 0 or 1; the example is repeated to 2."""
    out = dict(inputs)
    for name, dims in dynamic.items():
        tensor = out[name]
        for i in dims:
            if tensor.shape[i] == 1:
                tensor = torch.cat([tensor, tensor], dim=i)
        out[name] = tensor
    return out


def _plain(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The unflattened tree as plain GraphModules and containers."""
    if id(module) in memo:
        return memo[id(module)]
    graph = getattr(module, "graph", None)
    has_graph = isinstance(graph, fx.Graph) and any(n.op == "output" for n in graph.nodes)
    plain = fx.GraphModule(nn.Module(), fx.Graph()) if has_graph else nn.Module()
    memo[id(module)] = plain
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        plain.register_parameter(name, parameter)
    persistent = getattr(module, "_non_persistent_buffers_set", set[str]())
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        plain.register_buffer(name, buffer, persistent=name not in persistent)
    for name, constant in vars(module).items():  # made in a forward: `x[i] = True`
        if isinstance(constant, torch.Tensor):
            plain.register_buffer(name, constant.detach(), persistent=False)
    for name, child in module._modules.items():
        if child is not None:
            plain.add_module(name, _plain(child, memo))
    if has_graph:
        assert isinstance(plain, fx.GraphModule)
        assert isinstance(graph, fx.Graph)
        copied = fx.Graph()
        output = copied.graph_copy(graph, val_map := {})
        for node in graph.nodes:
            if node in val_map:
                val_map[node].meta = dict(node.meta)
        copied.output(output)
        for node in copied.nodes:
            if node.name == "self":  # BERT's `attention.self`; in generated code it is the module
                node._rename("self_")
        set_graph(plain, copied)
    return plain


def _forget_values(exported: torch.export.ExportedProgram, original: nn.Module) -> None:
    """Parameters without memory in place of those that `_bind` puts back: unflatten copies every one."""
    known = dict(original.named_parameters(remove_duplicate=False))
    bare: dict[int, nn.Parameter] = {}
    state: Any = exported.state_dict
    for name, tensor in list(state.items()):
        if tensor is known.get(name):
            if id(tensor) not in bare:
                bare[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
            state[name] = bare[id(tensor)]


def _bind(root: nn.Module, original: nn.Module) -> None:
    """Put the original's own tensors in place of unflatten's clones, so that ties and values are its."""
    for path, module in root.named_modules(remove_duplicate=False):
        try:
            source = original.get_submodule(path)
        except AttributeError:
            continue
        for name in list(module._parameters):
            if name in source._parameters:
                module._parameters[name] = source._parameters[name]
        for name in list(module._buffers):
            if name in source._buffers:
                module._buffers[name] = source._buffers[name]


def _share(root: fx.GraphModule, original: nn.Module) -> None:
    """A module that the original holds under several names is one module of the tree, if it was traced alike."""
    first: dict[int, str] = {}
    memo: dict[int, str] = {}
    ours = dict(root.named_modules(remove_duplicate=False))
    for path, module in original.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), path)
        if known == path or path not in ours or known not in ours:
            continue
        if next(module.parameters(), None) is not None and structure_hash(
            ours[known], memo
        ) == structure_hash(ours[path], memo):
            parent, _, name = path.rpartition(".")
            root.get_submodule(parent)._modules[name] = root.get_submodule(known)


def _drop_constant_inputs(root: fx.GraphModule) -> list[str]:
    """Inputs that were None or plain numbers are part of the graph, not of its signature."""
    dropped: list[str] = []
    for node in [n for n in root.graph.nodes if n.op == "placeholder"]:
        if not isinstance(value(node), torch.Tensor) and not node.users:
            dropped.append(str(node.target))
            root.graph.erase_node(node)
    return dropped


def _ports(
    root: fx.GraphModule, dynamic: Mapping[str, Mapping[int, str]], model: Model
) -> tuple[Port, ...]:
    nodes = {str(n.target): n for n in root.graph.nodes if n.op == "placeholder"}
    symbols: dict[str, str] = {}  # also names the sizes of tensors inside tuples and dicts
    for name, dims in dynamic.items():
        for i, dimension in dims.items():
            symbols[str(value(nodes[name]).shape[i])] = dimension
    return tuple(
        Port(
            name,
            tuple(symbols.get(str(s), size_hint(s)) for s in value(node).shape),
            str(value(node).dtype).removeprefix("torch."),
            model.meanings.get(name, "other"),
        )
        for name, node in nodes.items()
    )


def _outputs(exported: torch.export.ExportedProgram, module: nn.Module) -> Outputs:
    spec = exported.call_spec.out_spec
    assert spec is not None
    if spec.is_leaf():
        return Outputs("tensor")
    context = getattr(spec, "_context", None) or getattr(spec, "context", None)
    if spec.type in (tuple, list):
        return Outputs("tuple")
    names = _field_names(context)
    return Outputs("named", names) if names else Outputs("tuple")


def _field_names(context: Any) -> tuple[str, ...]:
    """Field names in the context of a dict-like output (dict, ModelOutput)."""
    if isinstance(context, (list, tuple)):
        items: list[Any] = list(context)  # pyright: ignore[reportUnknownArgumentType]
        if items and all(isinstance(c, str) for c in items):
            return tuple(items)
        for item in items:
            found = _field_names(item)
            if found:
                return found
    return ()


def _class_name(of: nn.Module) -> str:
    """`package.module.Class`; a MODEL file's own classes by the file's name, a saved program's as it was saved."""
    saved = of.type_name() if isinstance(of, InterpreterModule) else None
    if saved:
        return saved
    cls = type(of)
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if cls.__module__.startswith(USER_MODULE) and file:
        return f"{Path(file).stem}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _device(model: Model, value: torch.Tensor) -> torch.device:
    return next((p.device for p in model.module.parameters()), value.device)


def _model_dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _absent(model: Model) -> list[str]:
    parameters = inspect.signature(model.module.forward).parameters
    return [
        n
        for n, p in parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and (n not in model.inputs or model.inputs[n] is None)
    ]
