"""What a model writes outside its own values: buffers and inputs that its forward changes in place.

A Program is a function of its inputs. A write that no output depends on is left out of it, and a note says so; a buffer
that is changed *and* read would give another result at every call, and is refused with the user's line.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from graftc.diagnostics import Diagnostic, Note, fail
from graftc.program.kept import PLAIN, Changes, buffers_without_values
from graftc.program.traces import own_lines

_WRITES = frozenset(
    getattr(OutputKind, name)
    for name in ("BUFFER_MUTATION", "PARAMETER_MUTATION", "USER_INPUT_MUTATION")
    if hasattr(OutputKind, name)  # the second is younger than the others
)

STATE_HELP = (
    "call `.eval()` on the model if only training does this (BatchNorm); "
    "else hand the state in as an input and return it as an output"
)


def without_writes(exported: torch.export.ExportedProgram, told: bool = True) -> list[Diagnostic]:
    """Take the writes out of a functional program (in place); a warning (G811) on each.

    Raises GraftError (G809), where that is to be `told`, if an output depends on what is written: the model keeps state
    from call to call.
    """
    graph, signature = exported.graph_module.graph, exported.graph_signature
    output = next(n for n in graph.nodes if n.op == "output")
    values: tuple[Any, ...] = tuple(output.args[0])  # pyright: ignore[reportArgumentType]
    specs = signature.output_specs
    pairs = list(zip(values, specs, strict=True))
    written = [(v, s) for v, s in pairs if s.kind in _WRITES]
    if not written:
        return []
    results = [v for v, s in pairs if s.kind not in _WRITES and isinstance(v, fx.Node)]
    reached = _before(results)
    held = {
        s.target: s.arg.name  # pyright: ignore[reportAttributeAccessIssue]
        for s in signature.input_specs
        if s.kind in (InputKind.BUFFER, InputKind.PARAMETER)
    }
    warnings_: list[Diagnostic] = []
    for value, spec in written:
        line = next(iter(own_lines(value.meta.get("stack_trace"))), "")
        if (
            told
            and spec.kind is not OutputKind.USER_INPUT_MUTATION
            and held.get(spec.target) in {n.name for n in reached}
        ):
            fail(
                "G809",
                f"forward changes `{spec.target}` and reads it, so that every call gives another result",
                site=str(spec.target),
                wanted="outputs that depend on the inputs and the weights alone",
                found="a buffer that is written in place",
                notes=[Note(line)] if line else [],
                help=STATE_HELP,
            )
        warnings_.append(
            Diagnostic(
                "G811",
                f"forward writes to `{spec.target}`; the student returns the same, and leaves the write out",
                site=str(spec.target),
                notes=(Note(line),) if line else (),
                severity="warning",
            )
        )
    output.args = (tuple(v for v, s in pairs if s.kind not in _WRITES),)
    specs[:] = [s for s in specs if s.kind not in _WRITES]
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return warnings_


def check_constants(
    exported: torch.export.ExportedProgram, module: nn.Module, changes: Changes
) -> None:
    """Raise GraftError (G809) for a tensor in a plain attribute that forward reads, and writes or sets anew."""
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        path, _, name = str(spec.target).rpartition(".")
        if spec.kind is not InputKind.CONSTANT_TENSOR or not _has(module, path, name):
            continue
        node = nodes[spec.arg.name]  # pyright: ignore[reportAttributeAccessIssue]
        writes = [u for u in node.users if _writes_to(u, node)]
        if not writes and not ((path, name) in changes.tensors and node.users):
            continue
        line = next(iter(own_lines((writes or [*node.users])[0].meta.get("stack_trace"))), "")
        fail(
            "G809",
            f"forward changes `{spec.target}` and reads it, so that every call gives another result",
            site=str(spec.target),
            wanted="outputs that depend on the inputs and the weights alone",
            found="a tensor in an attribute that forward sets",
            notes=[Note(line)] if line else [],
            help=STATE_HELP,
        )


def _has(module: nn.Module, path: str, name: str) -> bool:
    try:
        return name in vars(module.get_submodule(path))
    except AttributeError:  # a constant that tracing made
        return False


def _writes_to(op: fx.Node, tensor: fx.Node) -> bool:
    schema: Any = getattr(op.target, "_schema", None)
    return schema is not None and any(
        given is tensor and a.alias_info is not None and a.alias_info.is_write
        for given, a in zip(op.args, schema.arguments, strict=False)
    )


def _before(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they depend on."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def check_attributes(module: nn.Module, inputs: Mapping[str, Any], changes: Changes) -> None:
    """Raise GraftError (G809) where forward counts in a plain attribute (`self.calls += 1`).

    A forward that leaves the same number at every call (`self.last_length = x.shape[1]`) is not meant: what tracing
    set is looked at in two calls on tensors without values.
    """
    if not changes.set:
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = pytree.tree_map_only(torch.Tensor, mode.from_tensor, dict(inputs))
    seen: list[dict[tuple[str, str], Any]] = []
    with buffers_without_values(module, mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            try:
                with mode, torch.no_grad():
                    module(**given)
            except Exception:  # it needs values: whether it counts cannot be seen
                return
            seen.append({k: vars(module.get_submodule(k[0])).get(k[1]) for k in changes.set})
    for (path, name), value in seen[0].items():
        now = seen[1][path, name]
        if type(now) in PLAIN and now != value:
            where = f"{path}.{name}" if path else name
            line = _line_that_sets(module.get_submodule(path), name)
            fail(
                "G809",
                f"forward changes `{where}` at every call, and the captured graph has one value of it",
                site=where,
                wanted="outputs that depend on the inputs and the weights alone",
                found=f"{value}, then {now}",
                notes=[Note(line)] if line else [],
                help="hand the count in as an input, or keep it outside the model",
            )


def _line_that_sets(module: nn.Module, name: str) -> str:
    """The first line of the forward of a module's class that assigns `self.NAME`."""
    try:
        lines, first = inspect.getsourcelines(type(module).forward)
        file = inspect.getsourcefile(type(module)) or "?"
    except (OSError, TypeError):  # made in an interactive session
        return ""
    sets = re.compile(rf"\.{re.escape(name)}\s*[-+*/|&%^]*=(?!=)")
    for number, line in enumerate(lines, first):
        if sets.search(line):
            return f'File "{file}", line {number}, in forward {line.strip()}'
    return ""
