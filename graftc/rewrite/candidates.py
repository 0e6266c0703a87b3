"""The candidates of `one of` that are not in the student: each a small Program of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from graftc.program.analysis import Site
from graftc.program.program import Outputs, Port, Program, size_hint, value
from graftc.rewrite.apply_common import build, class_name
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.values import record_values

OPERATOR = "operator"
"""The path of the operator in its package's model."""


def candidate_path(edit: Edit, index: int) -> str:
    """Where a build holds a candidate: `candidates/blocks.1.attn/1`."""
    return f"candidates/{edit.name}/{index}"


def candidate_programs(edit: Edit, program: Program) -> Iterator[tuple[int, NewModule, Program]]:
    """The candidates that are not in the student: index, operator, a model of that operator alone.

    Its weights are those that the operator's constructor draws; the caller initialises them.
    """
    for index, new in enumerate(edit.candidates):
        if new is not None and index > 0:
            yield index, new, _program(edit.sites[0], new, program)


def _program(site: Site, new: NewModule, program: Program) -> Program:
    graph_module = program.module(site.graph)
    assert isinstance(graph_module, fx.GraphModule)
    call = next(n for n in graph_module.graph.nodes if n.name == site.node)
    given = {"x": call.args[site.stream], **{n: call.args[i] for n, i in new.inputs.items()}}
    values = {n: value(a) for n, a in given.items() if isinstance(a, fx.Node)}
    device = next((p.device for p in program.root.parameters()), torch.device("cpu"))
    root, operator = nn.Module(), build(new, device, values["x"].dtype)
    if isinstance(operator, fx.GraphModule):
        record_values(operator, (values["x"],))
    root.add_module(OPERATOR, operator)
    graph = fx.Graph()
    inputs = {n: graph.placeholder(n) for n in values}
    made = graph.call_module(
        OPERATOR, (inputs["x"],), {n: i for n, i in inputs.items() if n != "x"}
    )
    graph.output(made)
    for name, node in inputs.items():
        node.meta["val"] = values[name]
    made.meta["val"] = value(call)
    symbols = _symbols(program)
    ports = tuple(
        Port(
            name,
            tuple(symbols.get(str(s), size_hint(s)) for s in val.shape),
            str(val.dtype).removeprefix("torch."),
            "tokens" if name == "x" else "other",
        )
        for name, val in values.items()
    )
    outputs = Outputs("tuple" if isinstance(value(call), (tuple, list)) else "tensor")
    return Program(
        fx.GraphModule(root, graph),
        ports,
        outputs,
        program.facts,
        {"": f"{class_name(new.spec.name)}Candidate", OPERATOR: class_name(new.spec.name)},
    )


def _symbols(program: Program) -> dict[str, str]:
    """The names of dynamic sizes, by the symbol that capture gave them."""
    ports = {p.name: p.shape for p in program.inputs}
    found: dict[str, str] = {}
    for node in program.root.graph.nodes:
        if node.op == "placeholder":
            sizes = getattr(value(node), "shape", ())
            for size, name in zip(sizes, ports.get(str(node.target), ()), strict=False):
                if isinstance(name, str):
                    found[str(size)] = name
    return found
