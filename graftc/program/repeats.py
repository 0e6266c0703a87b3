"""Blocks that repeat are traced once: capture then costs what the *distinct* blocks cost.

While torch.export runs, the second block of a kind is one opaque op (`graftc_capture::repeat`), and its
graph is afterwards a copy of the first one's. A block is of a kind if tracing could not tell it from
the first: same classes and shapes, same inputs, and every attribute that the first one's forward *read* is
the same in it. So a `layer_idx` that only a cache reads does not matter, and a `window` that differs does.
What cannot be said so (state written in forward, values taken from elsewhere) raises `NotShared`, and the
model is traced block by block.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graftc.program import reads, sizes

_LIBRARY = torch.library.Library("graftc_capture", "DEF")
_LIBRARY.define("mark(int kind, Tensor[] values) -> Tensor[]")
_LIBRARY.define("repeat(int kind, Tensor[] values) -> Tensor[]")
_OPS: Any = torch.ops.graftc_capture
_KINDS: dict[int, Kind] = {}
_NUMBERS = itertools.count()


def is_capture_op(target: Any) -> bool:
    """Whether a node's target only says where a repeated block stands in a trace, and is none of the model's.

    >>> is_capture_op(torch.ops.graftc_capture.mark.default), is_capture_op(torch.ops.aten.relu.default)
    (True, False)
    """
    return getattr(target, "namespace", None) == "graftc_capture"


class NotShared(Exception):
    """A block has to be traced for itself; the message says which and why."""


@dataclass(eq=False)
class Kind:
    """The first block of a kind, as it was traced."""

    path: str
    module: nn.Module
    leaves: list[Any]
    spec: Any
    modes: tuple[Any, ...]
    read: frozenset[tuple[str, str]] = frozenset()
    outputs: list[Any] = field(default_factory=list[Any])
    output_spec: Any = None
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def fits(self, module: nn.Module, leaves: list[Any], spec: Any) -> bool:
        """Whether tracing `module` on these inputs would record what it recorded for this block."""
        return (
            spec == self.spec
            and _modes() == self.modes
            and _same_leaves(self.leaves, leaves)
            and reads.same(self.module, module, self.read)
        )


@dataclass
class Blocks:
    """The kinds found while a model was traced, and the blocks that were not traced: path → kind."""

    kinds: list[Kind] = field(default_factory=list[Kind])
    repeats: dict[str, Kind] = field(default_factory=dict[str, Kind])


@contextmanager
def traced_once(root: nn.Module) -> Generator[Blocks]:
    """Within, a forward of `root` runs each kind of block once; the result is for `expand`."""
    blocks = Blocks()
    called: set[str] = set()
    groups = list(_groups(root))
    try:
        for group in groups:
            kinds: list[Kind] = []
            for path, module in group:
                module.forward = functools.partial(
                    _forward, path, module, module.forward, kinds, blocks, called
                )
        yield blocks
    finally:
        for group in groups:
            for _, module in group:
                module.__dict__.pop("forward", None)
        for kind in blocks.kinds:
            _KINDS.pop(kind.number, None)


def _forward(
    path: str,
    module: nn.Module,
    original: Any,
    kinds: list[Kind],
    blocks: Blocks,
    called: set[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of a block's forward while its model is traced."""
    if path in called:
        raise NotShared(f"`{path}` is called more than once")
    called.add(path)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not all(_is_plain(leaf) for leaf in leaves):
        return original(*args, **kwargs)
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    for kind in kinds:
        if kind.fits(module, leaves, spec):
            blocks.repeats[path] = kind
            made = iter(_OPS.repeat(kind.number, tensors))
            filled = [next(made) if isinstance(v, Tensor) else v for v in kind.outputs]
            return pytree.tree_unflatten(filled, kind.output_spec)
    kind = Kind(path, module, leaves, spec, _modes())
    marked = iter(_OPS.mark(kind.number, tensors))
    again = [next(marked) if isinstance(v, Tensor) else v for v in leaves]
    args, kwargs = pytree.tree_unflatten(again, spec)
    with reads.recorded(module) as record:
        result = original(*args, **kwargs)
    if pytree.tree_structure((args, kwargs)) != spec:
        raise NotShared(f"`{path}` changes a list or dict that it is given")
    outputs, kind.output_spec = pytree.tree_flatten(result)
    if record.written or not all(_is_plain(v) and _is_backed(v) for v in outputs):
        raise NotShared(f"`{path}` keeps state, or returns more than tensors")
    kind.read = frozenset(record.read)
    kind.outputs = outputs
    blocks.kinds.append(kind)
    kinds.append(kind)
    _KINDS[kind.number] = kind
    out = iter(_OPS.mark(kind.number, [v for v in outputs if isinstance(v, Tensor)]))
    filled = [next(out) if isinstance(v, Tensor) else v for v in outputs]
    return pytree.tree_unflatten(filled, kind.output_spec)


@torch.library.register_fake("graftc_capture::mark", lib=_LIBRARY)
def _mark(kind: int, values: list[Tensor]) -> list[Tensor]:
    return [_like(v) for v in values]


@torch.library.register_fake("graftc_capture::repeat", lib=_LIBRARY)
def _repeat(kind: int, values: list[Tensor]) -> list[Tensor]:
    return [_like(v) for v in _KINDS[kind].outputs if isinstance(v, Tensor)]


def _like(v: Tensor) -> Tensor:
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)


def _modes() -> tuple[Any, ...]:
    """What of torch's state changes what is traced."""
    cast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), *cast)


def _is_plain(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.layout == torch.strided
    return leaf is None or type(leaf) in (bool, int, float, str, torch.dtype, torch.device)


def _is_backed(leaf: Any) -> bool:
    """Whether no size of a tensor depends on the values of another."""
    return not isinstance(leaf, Tensor) or not any(
        isinstance(s, torch.SymInt) and s.node.hint is None for s in leaf.shape
    )


def _same_leaves(ours: list[Any], theirs: list[Any]) -> bool:
    if _pattern(ours) != _pattern(theirs):
        return False
    return all(
        _meta(a) == _meta(b)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and not isinstance(a, Tensor) and a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def _pattern(leaves: list[Any]) -> list[int]:
    """Which tensors are one and the same."""
    ids = [id(v) if isinstance(v, Tensor) else None for v in leaves]
    return [ids.index(i) for i in ids]


def _meta(v: Tensor) -> tuple[Any, ...]:
    """A tensor's kind; a dynamic size by its expression, since comparing sizes would add a guard."""
    shape = [s.node.expr if isinstance(s, torch.SymInt) else s for s in v.shape]
    stride = [s.node.expr if isinstance(s, torch.SymInt) else s for s in v.stride()]
    return (shape, stride, v.dtype, v.device, v.requires_grad)


def _groups(root: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Blocks that are built alike; none inside another."""
    keys: dict[int, Any] = {}
    paths = list(root.named_modules(remove_duplicate=False))
    if len({id(m) for _, m in paths}) != len(paths):
        return  # modules under several names: their calls are told apart by path alone
    count = Counter(_key(m, keys) for _, m in paths)
    found: dict[Any, list[tuple[str, nn.Module]]] = {}
    stack = list(root.named_children())
    while stack:
        path, module = stack.pop(0)
        key = keys[id(module)]
        if count[key] > 1 and _is_block(module) and not _holds_chain(module, keys):
            found.setdefault(key, []).append((path, module))
        else:
            stack = [(f"{path}.{n}", m) for n, m in module.named_children()] + stack
    yield from (group for group in found.values() if len(group) > 1)


def _is_block(module: nn.Module) -> bool:
    """A module with a forward of its own, parts and parameters, and no hooks."""
    return (
        not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, fx.GraphModule))
        and any(True for _ in module.children())
        and any(True for _ in module.parameters())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        and not any("forward" in vars(m) for m in module.modules())
    )


def _holds_chain(module: nn.Module, keys: Mapping[int, Any]) -> bool:
    """Whether it is a stack of blocks itself."""
    return any(
        isinstance(m, (nn.ModuleList, nn.Sequential))
        and max(Counter(keys[id(c)] for c in m.children() if _is_block(c)).values(), default=0) > 1
        for m in module.modules()
    )


def _key(module: nn.Module, keys: dict[int, Any]) -> Any:
    """What a module is built of: classes, names, shapes, dtypes."""
    if id(module) not in keys:
        tensors = [*module._parameters.items(), *module._buffers.items()]
        keys[id(module)] = hash((
            type(module),
            module.training,
            *((n, None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad)) for n, t in tensors),
            *((n, None if m is None else _key(m, keys)) for n, m in module._modules.items()),
        ))  # fmt: skip
    return keys[id(module)]


def expand(root: fx.GraphModule, blocks: Blocks, copy: Any) -> None:
    """Take the marks out of the tree, and give every repeated block a copy of its kind's graph.

    `copy(module)` copies a subtree. Raises NotShared where a kind reads values that are not its inputs.
    """
    found = {k.number: _unmark(_graph_module(root, k.path), k) for k in blocks.kinds}
    sizes.drop_unused_inputs(root)  # a mark reads every input
    for kind in blocks.kinds:
        first = _graph_module(root, kind.path)
        sizes.read_sizes_here(first.graph)
        inputs, _ = found[kind.number]
        if any(n not in inputs for n in first.graph.nodes if n.op == "placeholder" and n.users):
            raise NotShared(f"`{kind.path}` reads values that are not its inputs")
    callers = sizes.call_sites(root)
    for path, kind in blocks.repeats.items():
        first, repeat = _graph_module(root, kind.path), _graph_module(root, path)
        given = _fill(repeat, kind, first, *found[kind.number], copy)
        _order_inputs(repeat, given, callers)
    for kind in blocks.kinds:
        _order_inputs(_graph_module(root, kind.path), found[kind.number][0], callers)
    sizes.drop_unused_inputs(root)


def _order_inputs(
    module: fx.GraphModule, wanted: list[fx.Node], callers: Mapping[int, list[fx.Node]]
) -> None:
    """Inputs in the order of the block's own forward."""
    before = [n for n in module.graph.nodes if n.op == "placeholder"]
    after = [n for n in dict.fromkeys(wanted) if n in before]
    after += [n for n in before if n not in after]
    for node in reversed(after):
        next(iter(module.graph.nodes)).prepend(node)
    for call in callers.get(id(module), []):
        given = dict(zip(before, call.args, strict=True))
        call.args = tuple(given[n] for n in after)


def _graph_module(root: nn.Module, path: str) -> fx.GraphModule:
    module = root.get_submodule(path)
    if not isinstance(module, fx.GraphModule):
        raise NotShared(f"`{path}` is not called as a module")
    return module


def _calls(graph: fx.Graph, target: Any, number: int) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is target and n.args[0] == number]


def _unmark(module: fx.GraphModule, kind: Kind) -> tuple[list[fx.Node], list[fx.Node]]:
    """Values that went in and came out, in the order of the leaves."""
    marks = _calls(module.graph, _OPS.mark.default, kind.number)
    tensors = any(isinstance(v, Tensor) for v in kind.outputs)
    if len(marks) != 2 or not tensors:
        raise NotShared(f"`{kind.path}` is not called as a module")
    found: list[list[fx.Node]] = []
    for mark in marks:
        # Read late: the second mark may hold what the first gave.
        given: list[fx.Node] = list(mark.args[1])  # pyright: ignore[reportArgumentType]
        _pass(mark, given)
        found.append(given)
    return found[0], found[1]


def _pass(call: fx.Node, given: Sequence[fx.Node | None]) -> None:
    """Let the users of each value that a call returns use another value instead."""
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise NotShared("a mark is used as a whole")
        other = given[user.args[1]]  # pyright: ignore
        if other is not None:
            user.replace_all_uses_with(other)
        elif user.users:
            raise NotShared("a repeated block's caller takes a result that the first one's leaves")
        user.graph.erase_node(user)
    call.graph.erase_node(call)


def _fill(
    module: fx.GraphModule,
    kind: Kind,
    first: fx.GraphModule,
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    copy: Any,
) -> list[fx.Node]:
    """The graph of a repeated block: its kind's, on its own inputs (which are returned) and parameters."""
    calls = _calls(module.graph, _OPS.repeat.default, kind.number)
    if len(calls) != 1:
        raise NotShared("a repeated block is not called as a module")
    call = calls[0]
    given: list[fx.Node] = list(call.args[1])  # pyright: ignore[reportArgumentType]
    copies = dict(zip(inputs, given, strict=True))
    with module.graph.inserting_before(call):
        for node in first.graph.nodes:
            if node.op not in ("placeholder", "output") and node not in copies:
                copies[node] = module.graph.node_copy(node, lambda n: copies[n])
    # What the first block's caller leaves is dead code there, and gone.
    _pass(call, [copies.get(n) for n in outputs])
    for name, child in first._modules.items():
        if child is not None:
            module._modules[name] = copy(child)
    for name, parameter in first._parameters.items():
        module._parameters.setdefault(name, parameter)
    for name, buffer in first._buffers.items():
        if name not in module._buffers:
            module.register_buffer(name, buffer, name not in first._non_persistent_buffers_set)
    return given
