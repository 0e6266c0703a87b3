"""Apply: all edits at once on a copy of the Program, one recompile of each touched graph; and undo."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from graftc.diagnostics import fail
from graftc.operators import build as operators
from graftc.operators.spec import OperatorSpec, Value
from graftc.program.program import ATEN, Program, graphs, join, size_hint, value
from graftc.rewrite.claims import inner_first
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.tree import copy_graph, prune, set_module, with_own_paths


@dataclass(frozen=True, eq=False)
class Patch:
    """What `apply` took out: the graphs it changed and the modules it replaced or removed.

    `added`: paths that the original has not; `order`: the names of the children of each module that
    lost or gained one, so that undoing gives a state dict in the original's order.
    """

    graphs: Mapping[str, fx.Graph]
    taken: Mapping[str, nn.Module]
    added: tuple[str, ...]
    order: Mapping[str, tuple[str, ...]]


def apply(
    program: Program, edits: Iterable[Edit], *, on_meta: bool = False
) -> tuple[Program, Patch]:
    """The student, its new operators with their modules' own first weights, and the way back.

    What no edit touches is shared with `program`, parameters included; names of untouched parameters
    do not change. With `on_meta` the new operators have no weights. Raises GraftError where an edit cannot be made, and then nothing has changed.
    """
    chosen = list(edits)
    chosen = [chosen[i] for i in inner_first([e.claim for e in chosen])]
    touched = {e.graph for e in chosen} | {_parent(n.path) for e in chosen for n in e.new}
    touched |= {_parent(s.path) for e in chosen for s in e.sites}
    existing = {p for p in touched if _exists(program.root, p)}
    root = with_own_paths(program.root, existing)
    before = {p: m.graph for p, m in graphs(program.root) if p in {e.graph for e in chosen}}
    for edit in chosen:
        _APPLY[edit.kind](root, program, edit, on_meta)
    for path in before:
        module = root.get_submodule(path)
        assert isinstance(module, fx.GraphModule)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    prune(root, program.root)
    student = replace(program, root=root)
    return student, _patch(program, student, before, chosen)


def undo(student: Program, patch: Patch) -> Program:
    """The original, bit for bit: graphs, module names, parameters.

    Modules that the patch did not touch are taken from the student.
    """
    parents = map(_parent, [*patch.taken, *patch.added, *(join(p, "_") for p in patch.order)])
    own = [p for p in (*patch.graphs, *parents) if _exists(student.root, p)]
    root = with_own_paths(student.root, own)
    for path in patch.added:
        root.get_submodule(_parent(path))._modules.pop(path.rpartition(".")[2], None)
    for path, module in patch.taken.items():
        set_module(root, path, module)
    for path, graph in patch.graphs.items():
        module = root.get_submodule(path)
        assert isinstance(module, fx.GraphModule)
        module.graph = copy_graph(graph)
    for path, names in patch.order.items():
        parent = root.get_submodule(path)
        parent._modules = {n: parent._modules[n] for n in names}
    return replace(student, root=root)


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


def _patch(
    program: Program, student: Program, before: Mapping[str, fx.Graph], edits: list[Edit]
) -> Patch:
    old = dict(program.root.named_modules(remove_duplicate=False))
    new = dict(student.root.named_modules(remove_duplicate=False))
    replaced = {n.path for e in edits for n in e.new}
    gone = [p for p in old if p and (p not in new or p in replaced)]
    top_gone = [p for p in gone if not any(p.startswith(g + ".") for g in gone)]
    added = [
        p
        for p in new
        if p and p not in old and not any(p.startswith(r + ".") for r in replaced if r in old)
    ]
    top_added = [p for p in added if not any(p.startswith(a + ".") for a in added)]
    parents = {_parent(p) for p in (*top_gone, *top_added)}
    order = {p: tuple(old[p]._modules) for p in parents if p in old}
    return Patch(before, {p: old[p] for p in top_gone}, tuple(top_added), order)


# -- the four kinds ----------------------------------------------------------------------------


def _replace(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    (site,), (new,) = edit.sites, edit.new
    graph, node = _call(root, edit.graph, site.node)
    _check_single_use(program, site.path)
    module = _placed(root, new, node.args[site.stream], on_meta)
    node.args = (node.args[site.stream],)
    _mark(node, edit, site.path)
    _check_shape(module, node, new)
    del graph


def _remove(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    (site,) = edit.sites
    graph, node = _call(root, edit.graph, site.node)
    with graph.inserting_before(node):
        zero = graph.call_function(ATEN.zeros_like.default, (node.args[site.stream],))
    stream = node.args[site.stream]
    assert isinstance(stream, fx.Node)
    zero.meta["val"] = value(stream)
    if _shape(value(node)) != _shape(value(stream)):
        fail(
            "G359",
            f"{site.path} does not return what it reads; it cannot be removed",
            span=edit.rule.edit.span,
            site=site.path,
            wanted=str(_shape(value(stream))),
            found=str(_shape(value(node))),
        )
    node.replace_all_uses_with(zero)
    graph.erase_node(node)
    _fold_zero(graph, zero)


def _fold_zero(graph: fx.Graph, zero: fx.Node) -> None:
    """0 · x is 0 and x + 0 is x, so that nothing of a removed branch is left behind."""
    zeros = [zero]
    while zeros:
        current = zeros.pop()
        for user in list(current.users):
            others = [a for a in user.args[:2] if isinstance(a, fx.Node) and a is not current]
            same = _shape(value(user)) == _shape(value(current))
            if user.target is ATEN.mul.Tensor and same:
                zeros.append(user)
            elif (
                user.target is ATEN.add.Tensor
                and others
                and _shape(value(user)) == _shape(value(others[0]))
            ):
                user.replace_all_uses_with(others[0])
                graph.erase_node(user)


def _skip(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    (site,) = edit.sites
    graph, node = _call(root, edit.graph, site.node)
    stream = node.args[site.stream]
    assert isinstance(stream, fx.Node)
    if _shape(value(node)) != _shape(value(stream)):
        fail(
            "G359",
            f"{site.path} returns more than the residual stream; it cannot be skipped",
            span=edit.rule.edit.span,
            site=site.path,
            wanted=str(_shape(value(stream))),
            found=str(value(node)),
        )
    node.replace_all_uses_with(stream)
    graph.erase_node(node)


def _parallel(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    graph, first = _call(root, edit.graph, edit.sites[0].node)
    stream = first.args[edit.sites[0].stream]
    assert isinstance(stream, fx.Node)
    sites = {s.path: s for s in edit.sites}
    _check_chain(root, edit)
    last = _call(root, edit.graph, edit.sites[-1].node)[1]
    results: list[fx.Node] = []
    position = last
    for path in edit.branches:
        if path in sites:
            node = _call(root, edit.graph, sites[path].node)[1]
            index = sites[path].stream
            node.args = (*node.args[:index], stream, *node.args[index + 1 :])
        else:
            new = next(n for n in edit.new if n.path == path)
            module = _placed(root, new, stream, on_meta)
            with graph.inserting_after(position):
                node = graph.call_module(_local(edit.graph, path), (stream,))
            node.meta["val"] = value(last)
            _check_shape(module, node, new)
            position = node
        _mark(node, edit, path)
        results.append(node)
    uses = list(last.users)
    merged = _merge(root, graph, edit, stream, results, position, on_meta)
    for user in uses:
        user.replace_input_with(last, merged)
    _mark(merged, edit, edit.name)


def _merge(
    root: fx.GraphModule,
    graph: fx.Graph,
    edit: Edit,
    stream: fx.Node,
    results: list[fx.Node],
    after: fx.Node,
    on_meta: bool,
) -> fx.Node:
    new = edit.new[-1]
    given = (stream, *results) if edit.of_blocks and edit.merge == "sum" else tuple(results)
    _placed(root, new, stream, on_meta)
    with graph.inserting_after(after):
        node = graph.call_module(_local(edit.graph, new.path), given)
    node.meta["val"] = value(results[-1])
    return node


_APPLY = {"replace": _replace, "remove": _remove, "skip": _skip, "parallel": _parallel}


# -- helpers -----------------------------------------------------------------------------------


def _call(root: fx.GraphModule, path: str, name: str) -> tuple[fx.Graph, fx.Node]:
    module = root.get_submodule(path)
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.name == name:
            return module.graph, node
    raise KeyError(f"{path}: no node {name}")


def _placed(root: fx.GraphModule, new: NewModule, source: Any, on_meta: bool) -> nn.Module:
    """The new operator, in the dtype of the values it will read, in its place in the tree."""
    assert isinstance(source, fx.Node)
    tensor = value(source)
    dtype = tensor.dtype if isinstance(tensor, torch.Tensor) else torch.float32
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    device = torch.device("meta") if on_meta else device
    module = build(new, device, dtype)
    set_module(root, new.path, module)
    return module


def _check_shape(module: nn.Module, node: fx.Node, new: NewModule) -> None:
    """The operator must return what the site returned."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = _shape(value(source))
    wanted = _shape(value(node))
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
        from copy import deepcopy

        twin = deepcopy(module).to("meta")
    try:
        found = tuple(twin(torch.empty(shape, device="meta", dtype=dtype)).shape)
    except (RuntimeError, ValueError) as error:
        fail(
            "G360",
            f"`{new.spec.name}` does not take the input of {new.path}: {error}",
            site=new.path,
            found=str(shape),
        )
    if found != wanted:
        fail(
            "G360",
            f"`{new.spec.name}` returns another shape than {new.path}",
            site=new.path,
            wanted=str(wanted),
            found=str(found),
        )


def _check_single_use(program: Program, path: str) -> None:
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


def _check_chain(root: fx.GraphModule, edit: Edit) -> None:
    """Between the branches nothing else may use what the earlier ones made."""
    nodes = [_call(root, edit.graph, s.node)[1] for s in edit.sites]
    for before, after in itertools.pairwise(nodes):
        others = [u for u in before.users if u is not after]
        if others:
            fail(
                "G362",
                f"`{others[0].name}` also reads the output of {before.target}",
                span=edit.rule.edit.span,
                site=edit.name,
                help="blocks in parallel must be neighbours that only feed each other",
            )


def _mark(node: fx.Node, edit: Edit, site: str) -> None:
    """Provenance: rule, span, site."""
    node.meta["graft"] = (edit.rule.name, edit.origin, site)


def _local(graph: str, path: str) -> str:
    return path.removeprefix(graph + ".") if graph else path


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _exists(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _shape(val: Any) -> tuple[int, ...] | None:
    return tuple(size_hint(s) for s in val.shape) if isinstance(val, torch.Tensor) else None
