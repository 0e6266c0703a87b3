"""What an ONNX file cannot hold: state that a call leaves behind, a changed input, random numbers.

An exporter writes such a model all the same: the state stays as it was at the first call, the caller's tensor is not
changed, and a runtime draws other numbers than torch, or a layer that drops values drops none. So they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from graftc.diagnostics import Diagnostic, GraftError, Note
from graftc.program.impure import draws


def check_pure(exported: torch.export.ExportedProgram, sites: Mapping[str, str]) -> None:
    """Raises GraftError, with module, line and rule, where a call of the traced model is no function of its inputs.

    `exported`: as it was traced, or decomposed. `sites`: edited site → rule and line.
    """
    _check_real(exported)
    inputs = {s.arg.name: s for s in exported.graph_signature.input_specs if hasattr(s.arg, "name")}
    for node, name in _changed(exported, inputs):
        spec = inputs[name]
        if spec.kind is InputKind.USER_INPUT:
            _refuse("G674", f"the model changes its input `{name}`: an exported file leaves it as it was", node, sites,
                    f"work on a copy: {name} = {name}.clone()")  # fmt: skip
        _refuse("G673", f"the model changes `{spec.target or name}` when it is called: an exported file keeps no state",
                node, sites, "take the state as an input and return it as an output, or drop it for inference")  # fmt: skip
    for node in exported.graph.nodes:
        if draws(node):
            _refuse("G675", f"the model draws random numbers ({_name(node)}): a runtime would draw others", node, sites,
                    "take the numbers as an input; dropout: put the model in eval mode before it is compiled")  # fmt: skip


def _check_real(exported: torch.export.ExportedProgram) -> None:
    """ONNX Runtime takes and gives no complex numbers; inside the model they are pairs of real ones."""
    names = {*exported.graph_signature.user_inputs, *exported.graph_signature.user_outputs}
    for node in exported.graph.nodes:
        made = node.meta.get("val")
        if node.name in names and isinstance(made, torch.Tensor) and made.is_complex():
            what = "input" if node.op == "placeholder" else "output"
            raise GraftError(
                Diagnostic(
                    "G818",
                    f"{what} `{node.name}` holds complex numbers, which a runtime does not take or give",
                    site=node.name,
                    wanted="real numbers",
                    found=str(made.dtype).removeprefix("torch."),
                    help="hand them over as real ones: `torch.view_as_real` outside, `torch.view_as_complex` in forward"
                    if what == "input"
                    else "return `torch.view_as_real(…)` of it",
                )
            )


def _changed(
    exported: torch.export.ExportedProgram, inputs: Mapping[str, Any]
) -> Iterator[tuple[fx.Node, str]]:
    """Node and placeholder, for each that is written to: in place, or, once decomposed, by the graph's signature."""
    signature = exported.graph_signature
    by_name = {n.name: n for n in exported.graph.nodes}
    targets = {str(s.target): name for name, s in inputs.items() if s.target is not None}
    for made, target in signature.buffers_to_mutate.items():
        yield by_name[made], targets[target]
    for made, target in signature.user_inputs_to_mutate.items():
        yield by_name[made], target
    aliases: dict[str, str] = {name: name for name in inputs}
    for node in exported.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in _arguments(node):
            name = aliases.get(value.name) if isinstance(value, fx.Node) else None
            if name is None or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                yield node, name
            aliases[node.name] = name  # a view of it, or itself


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The schema's arguments with what the node gives for each."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args) or argument.name in node.kwargs:
            yield argument, node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)  # fmt: skip


def _name(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return f"aten.{node.target._schema.name.partition('::')[2]}"


def _refuse(code: str, message: str, node: fx.Node, sites: Mapping[str, str], instead: str) -> None:
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values())) if path), "")
    lines = re.findall(
        r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or ""
    )
    own = [(f, n, text) for f, n, text in lines if "/torch/" not in f]
    notes = [Note(f"{f}:{n}: {text.strip()}") for f, n, text in own[-1:]]
    held = [r for s, r in sites.items() if f"{path}.".startswith(f"{s}.")]
    notes += [Note(f"made by rule {r}") for r in held[-1:]]
    raise GraftError(
        Diagnostic(code, message, site=path or "the model", notes=tuple(notes), help=instead)
    )
