"""What every kind of edit needs: finding a call, placing a new module, checking its shape, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn

from graftc.diagnostics import fail
from graftc.operators import build as operators
from graftc.operators.spec import OperatorSpec, Value
from graftc.program.analysis import Site
from graftc.program.program import Program, size_hint, value
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.tree import set_module
from graftc.rewrite.values import record_values


def build(new: NewModule, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A new operator's module, on a device, in a dtype, with the weights its own constructor draws."""
    return build_operator(new.spec, new.arguments, device, dtype, new.path)


def build_operator(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    device: torch.device | str,
    dtype: torch.dtype,
    site: str,
) -> nn.Module:
    try:
        with torch.device(device):
            module = operators.build(spec, arguments)
    except (ValueError, TypeError) as error:
        fail("G358", f"`{spec.name}` cannot be built at {site}: {error}", site=site)
    object.__setattr__(module, "graft_arguments", dict(arguments))  # how to build it again
    return module.to(dtype)


def find_call(root: fx.GraphModule, path: str, name: str) -> tuple[fx.Graph, fx.Node]:
    module = root.get_submodule(path)
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.name == name:
            return module.graph, node
    raise KeyError(f"{path}: no node {name}")


def place(root: fx.GraphModule, new: NewModule, source: Any, on_meta: bool) -> nn.Module:
    """The new operator, in the dtype of the values it will read, in its place in the tree."""
    assert isinstance(source, fx.Node)
    tensor = value(source)
    dtype = tensor.dtype if isinstance(tensor, torch.Tensor) else torch.float32
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    device = torch.device("meta") if on_meta else device
    module = build(new, device, dtype)
    if isinstance(module, fx.GraphModule) and isinstance(tensor, torch.Tensor) and not on_meta:
        record_values(module, (tensor,))
    set_module(root, new.path, module)
    return module


def call_arguments(new: NewModule, call: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a new operator's call takes of the site's call: the stream, and by name what it keeps."""
    return (call.args[new.site.stream],), {n: call.args[i] for n, i in new.inputs.items()}


def check_shape(module: nn.Module, node: fx.Node, new: NewModule) -> None:
    """The operator must return what the site returned."""
    values = [value(n) for n in node.all_input_nodes]
    shape = shape_of(values[0])
    wanted = shapes_of(value(node))
    if shape is None or wanted is None:
        fail(
            "G360",
            f"{new.path} does not return one tensor; `{new.spec.name}` cannot replace it",
            site=new.path,
            wanted="one tensor [batch, tokens, dim]",
            found=str(value(node)),
        )
    parameter = next(iter(module.parameters()), None)
    dtype = parameter.dtype if parameter is not None else torch.float32
    twin = module
    if parameter is None or parameter.device.type != "meta":
        twin = deepcopy(module).to("meta")

    def empty(given: Any) -> torch.Tensor:
        own = value(given)
        kept = dtype if own.is_floating_point() else own.dtype
        return torch.empty(shape_of(own) or (), device="meta", dtype=kept)

    try:
        with torch.no_grad():
            given = [empty(a) for a in node.args]
            # What a user's class returns was measured; its forward need not run without memory.
            user = new.spec.user is not None
            result = (
                given[0] if user else twin(*given, **{k: empty(v) for k, v in node.kwargs.items()})
            )
    except (RuntimeError, ValueError) as error:
        fail(
            "G360",
            f"`{new.spec.name}` does not take the input of {new.path}: {error}",
            site=new.path,
            found=str(shape),
        )
    found = shapes_of(result)
    if found != wanted:
        fail(
            "G360",
            f"`{new.spec.name}` returns another shape than {new.path}",
            site=new.path,
            wanted=_shown(wanted),
            found=_shown(found) if found is not None else type(result).__name__,
        )


def shapes_of(val: Any) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of a tensor, or of each of a tuple of tensors; None for anything else."""
    parts = val if isinstance(val, (tuple, list)) else (val,)
    shapes = tuple(s for p in parts if (s := shape_of(p)) is not None)
    return shapes if shapes and len(shapes) == len(parts) else None


def _shown(shapes: tuple[tuple[int, ...], ...]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else " and ".join(map(str, shapes))


def check_single_use(program: Program, path: str) -> None:
    callers = [
        (p, g, n)
        for p, uses in program.calls().items()
        if p == path or p.startswith(path + ".")
        for g, n in uses
    ]
    outside = [
        (p, g) for p, g, _ in callers if p != path and not (g == path or g.startswith(path + "."))
    ]
    if outside:
        fail(
            "G361",
            f"{outside[0][0]}, inside {path}, is also used by `{outside[0][1] or 'the root'}`",
            site=path,
            help="name a smaller site, or edit the other user too",
        )


def mark(node: fx.Node, edit: Edit, site: str) -> None:
    """Provenance: rule, span, site."""
    node.meta["graft"] = (edit.rule.name, edit.origin, site)


def class_name(operator: str) -> str:
    """`hyena_x` → `HyenaX`."""
    return "".join(w[:1].upper() + w[1:] for w in operator.split("_"))


STREAM = "graft_stream"
"""Node meta of a call that was rewired: which of its arguments is the stream now."""


def stream_of(call: fx.Node, site: Site) -> int:
    """Which argument of a site's call is the token stream, also where another rule replaced the site."""
    return call.meta.get(STREAM, site.stream)


def local(graph: str, path: str) -> str:
    return path.removeprefix(graph + ".") if graph else path


def parent_path(path: str) -> str:
    return path.rpartition(".")[0]


def exists(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def shape_of(val: Any) -> tuple[int, ...] | None:
    return tuple(size_hint(s) for s in val.shape) if isinstance(val, torch.Tensor) else None
