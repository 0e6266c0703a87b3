"""Operators that a rule put in, as graphs: what a further round of the rule matches, measures and edits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.program import Program, generate_code, join, size_hint, value
from graftc.rewrite.apply_common import class_name, parent_path
from graftc.rewrite.edits import NewModule
from graftc.rewrite.tree import set_module, with_own_paths
from graftc.rewrite.values import record_values


def opened(program: Program, news: Iterable[NewModule]) -> Program:
    """The Program with each of these operators as the graph of its ops, its parameters and their names as they were.

    Copies, operators that are graphs already, and merges of branches stay. Raises GraftError where an operator
    cannot be traced.
    """
    chosen = [n for n in news if n.copied is None and _is_closed(program.module(n.path))]
    if not chosen:
        return program
    calls = program.calls()
    callers = {n.path: calls[n.path][0][0] for n in chosen}
    touched = {*callers.values(), *(parent_path(n.path) for n in chosen)}
    root = with_own_paths(program.root, touched)
    classes = dict(program.classes)
    for new in chosen:
        graph, name = root.get_submodule(callers[new.path]), calls[new.path][0][1].name
        assert isinstance(graph, fx.GraphModule)
        call = next(n for n in graph.graph.nodes if n.name == name)
        inner = _traced(program.module(new.path), call)
        set_module(root, new.path, inner.root)
        classes |= {join(new.path, p): c for p, c in inner.classes.items() if p}
        classes[new.path] = class_name(new.spec.name)
    for path in set(callers.values()):
        module = root.get_submodule(path)
        assert isinstance(module, fx.GraphModule)
        generate_code(module)
    return replace(program, root=root, classes=classes)


def _is_closed(module: nn.Module) -> bool:
    """A module whose ops cannot be seen. A merge takes any number of branches, and holds no site."""
    kinds = (p.kind for p in inspect.signature(module.forward).parameters.values())
    return not isinstance(module, fx.GraphModule) and inspect.Parameter.VAR_POSITIONAL not in kinds


def _traced(module: nn.Module, call: fx.Node) -> Program:
    """An operator as it is called: one tensor out, its inputs in the order of the call, which becomes positional."""
    names = list(inspect.signature(module.forward).parameters)
    given: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    examples = {
        name: torch.zeros(
            [size_hint(s) for s in value(n).shape], dtype=value(n).dtype, device=device
        )
        for name, n in given.items()
    }
    dynamic = {name: _dynamic(value(n)) for name, n in given.items()}
    program = capture(Model(module.eval(), examples, dynamic=dynamic))
    output = next(n for n in program.root.graph.nodes if n.op == "output")
    if isinstance(output.args[0], (tuple, list)):
        output.args = (output.args[0][0],)
    ports = [p.name for p in program.inputs]
    call.args, call.kwargs = tuple(given[p] for p in ports), {}
    generate_code(program.root)
    record_values(program.root, [value(given[p]) for p in ports])
    return program


def _dynamic(tensor: Tensor) -> dict[int, str]:
    """Dimensions that are no plain numbers in the caller's graph; equal ones have one name."""
    return {
        at: "size_" + "".join(c if c.isalnum() else "_" for c in str(size))
        for at, size in enumerate(tensor.shape)
        if not isinstance(size, int)
    }
