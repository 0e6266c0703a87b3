"""The Program: a tree of plain FX graphs with the model's own names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graftc.diagnostics import Diagnostic, GraftError, Note

ATEN = torch.ops.aten

DATA_DEPENDENT = (
    "this line needs the values of a tensor: use torch.where or torch.cond; or, where they come of an input such as a mask, "
    'say that the example\'s values hold for every call: graftc.Model(…, fixed = ("mask",)), or `…?fixed=mask` after a '
    "MODEL word of diffusers or transformers"
)


class UnknownSize(GraftError):
    """A size that depends on the values of a tensor is asked for (G815); `told` gives it the user's line."""

    def __init__(self, line: str = "") -> None:
        super().__init__(
            Diagnostic(
                "G815",
                "the size of a tensor depends on the values of another, so that no shape after it is known",
                site="torch.export",
                wanted="shapes that depend on the shapes of the inputs alone",
                notes=(Note(line),) if line else (),
                help=DATA_DEPENDENT,
            )
        )


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its shape (dynamic dimensions by name), its dtype, what it is."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str = "other"


@dataclass(frozen=True)
class Outputs:
    """How the outputs are wrapped: 'tensor', 'tuple', or 'named' (field names of an output class)."""

    kind: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What capture fixed, and what the model's maker says of its tokens.

    `dynamic`: name of a dynamic dimension → the example's size; `notes`: sentences; `warnings`: what the
    original does and the graph does not; `grid`: rows and columns of the image tokens; `streams`: name of a token stream → its tokens in the example.
    """

    mode: str
    dtype: str
    dynamic: Mapping[str, int]
    absent: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[Diagnostic, ...] = ()
    grid: tuple[int, int] | None = None
    streams: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A captured, normalised model.

    `root` is a tree of `fx.GraphModule`s: root's graph calls its blocks by `call_module`, and so on
    down to leaves of single ops; parameters keep their qualified names. Passes never edit a Program
    in place: they build another (`graftc.rewrite.apply`). `classes` maps a module path to the name
    of its original class. `moved`: path of a module or parameter that an outlined region took in → its
    path in the model.
    """

    root: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: Outputs
    facts: Facts
    classes: Mapping[str, str]
    moved: Mapping[str, str] = field(default_factory=dict[str, str])

    def graphs(self) -> Iterator[tuple[str, fx.GraphModule]]:
        """Every graph of the tree with its path ('' is root), parents first, a shared module once."""
        yield from graphs(self.root)

    def module(self, path: str) -> nn.Module:
        return self.root.get_submodule(path)

    def calls(self) -> dict[str, list[tuple[str, fx.Node]]]:
        """Module path → the (graph path, node) pairs that call it."""
        found: dict[str, list[tuple[str, fx.Node]]] = {}
        for path, graph_module in self.graphs():
            for node in graph_module.graph.nodes:
                if node.op == "call_module":
                    found.setdefault(join(path, str(node.target)), []).append((path, node))
        return found


def join(path: str, name: str) -> str:
    """`a.b` and `c` → `a.b.c`; an empty path is root.

    >>> join("", "c"), join("a", "c")
    ('c', 'a.c')
    """
    return f"{path}.{name}" if path else name


def graphs(root: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every `fx.GraphModule` in `root` with its path, parents first, a shared one once."""
    for path, module in root.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module


def set_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a module a graph; its code is for `generate_code`, once the passes are done."""
    module._graph = graph
    graph.owning_module = module


def generate_code(module: fx.GraphModule) -> None:
    """Regenerate one module's code. `recompile` would do all GraphModules inside it again as well."""
    children = module._modules
    module.__dict__["_modules"] = {}
    try:
        module.recompile()
    finally:
        module.__dict__["_modules"] = children


def sweep(graph: fx.Graph) -> None:
    """Remove nodes that nobody uses. As `eliminate_dead_code`, which checks the whole graph first."""
    for node in reversed(graph.nodes):
        if not node.users and node.op != "placeholder" and not node.is_impure():
            graph.erase_node(node)


def value(node: fx.Node) -> Any:
    """The fake value that capture recorded for a node (None if there is none)."""
    return node.meta.get("val")


def size_hint(size: Any) -> int:
    """A dimension as a number: the example's, where it is dynamic.

    Raises GraftError (G815) for a size that depends on the values of a tensor, which no example has.
    """
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    known = hint if hint is not None else size.node.maybe_as_int()
    if known is None:
        raise UnknownSize()
    return int(known)


def shape_hint(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor at the example's sizes, None for what is no tensor."""
    val = value(node)
    return tuple(size_hint(s) for s in val.shape) if isinstance(val, torch.Tensor) else None


def tensor_of(program: Program, name: str) -> torch.Tensor | None:
    """A parameter or buffer by its qualified name; None where there is none."""
    path, _, last = name.rpartition(".")
    try:
        module = program.root.get_submodule(path)
    except AttributeError:
        return None
    found = getattr(module, last, None)
    return found if isinstance(found, torch.Tensor) else None


def structure_hash(module: nn.Module, memo: dict[int, str] | None = None) -> str:
    """A hash of what a module computes but not of its weights: equal for isomorphic blocks."""
    memo = {} if memo is None else memo
    key = id(module)
    if key not in memo:
        text = [type(module).__name__]
        if isinstance(module, fx.GraphModule):
            text.append(_graph_text(module.graph))
        elif hasattr(module, "extra_repr"):
            text.append(module.extra_repr())
        text += [f"{n}:{tuple(p.shape)}" for n, p in module.named_parameters(recurse=False)]
        text += [f"{n}:{tuple(b.shape)}" for n, b in module.named_buffers(recurse=False)]
        text += [f"{n}={structure_hash(m, memo)}" for n, m in module.named_children()]
        memo[key] = hashlib.sha256("\n".join(text).encode()).hexdigest()
    return memo[key]


def _graph_text(graph: fx.Graph) -> str:
    """A graph's text with nodes numbered, so that it does not depend on their names."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines: list[str] = []
    for node in graph.nodes:
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{number[n]}")
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        lines.append(f"{node.op} {target} {args}")
    return "\n".join(lines)
