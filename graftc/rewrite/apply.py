"""Apply: all edits at once on a copy of the Program, one recompile of each touched graph; and undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from graftc.diagnostics import GraftError
from graftc.program.program import Program, graphs, join
from graftc.rewrite.apply_common import class_name, exists, parent_path
from graftc.rewrite.apply_dtypes import follow_new_weights
from graftc.rewrite.apply_insert import insert_after
from graftc.rewrite.apply_parallel import parallel_branches
from graftc.rewrite.apply_sites import remove_site, replace_site, skip_block
from graftc.rewrite.apply_stream import fold_stream
from graftc.rewrite.apply_together import run_together
from graftc.rewrite.claims import inner_first
from graftc.rewrite.dataflow.rewriting import Opening, rewrite_region
from graftc.rewrite.edits import Edit
from graftc.rewrite.tree import copy_graph, prune, set_module, with_own_paths

Tensors = tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Patch:
    """What `apply` took out: the graphs it changed and the modules it replaced or removed.

    `added`: paths that the original has not; `order`: the names of the children of each module that
    lost or gained one, so that undoing gives a state dict in the original's order. `parameters`: the parameters
    and buffers, as they were, of graphs in which ops were rewritten.
    """

    graphs: Mapping[str, fx.Graph]
    taken: Mapping[str, nn.Module]
    added: tuple[str, ...]
    order: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Tensors] = field(default_factory=dict[str, "Tensors"])


def apply(
    program: Program, edits: Iterable[Edit], *, on_meta: bool = False
) -> tuple[Program, Patch]:
    """The student, its new operators with their modules' own first weights, and the way back.

    What no edit touches is shared with `program`, parameters included; names of untouched parameters
    do not change. With `on_meta` the new operators have no weights. Raises GraftError where an edit cannot be made, and then nothing has changed.
    """
    chosen = list(edits)
    chosen = [chosen[i] for i in inner_first([e.claim for e in chosen])]
    touched = {e.graph for e in chosen} | {parent_path(n.path) for e in chosen for n in e.new}
    touched |= {parent_path(s.path) for e in chosen for s in e.sites}
    touched |= {path for e in chosen for path in _refitted(e)}
    existing = {p for p in touched if exists(program.root, p)}
    root = with_own_paths(program.root, existing)
    before = {p: m.graph for p, m in graphs(program.root) if p in {e.graph for e in chosen}}
    for edit in chosen:
        if edit.ops is None:
            try:
                APPLY[edit.kind](root, program, edit, on_meta)
            except GraftError as error:  # of what is built there, which knows no line
                span = edit.rule.edit.span
                raise GraftError(
                    *(d if d.span else replace(d, span=span) for d in error.diagnostics)
                ) from error
            if edit.stream is not None:
                fold_stream(root, program, edit.stream)
    # Ops after sites: opening a module moves nodes, which an edit of sites finds by name.
    opening = Opening(root)
    for edit in sorted(chosen, key=lambda e: -e.graph.count(".")):
        if edit.ops is not None:
            rewrite_region(opening, edit.rule, edit.ops, edit.origin, on_meta)
    for path in before:
        module = root.get_submodule(path)
        assert isinstance(module, fx.GraphModule)
        follow_new_weights(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    prune(root, program.root)
    parameters = _swap_parameters(root, program.root, {e.graph for e in chosen if e.ops})
    if any("" in _refitted(e) for e in chosen):
        source = program.root
        parameters.setdefault("", (dict(source._parameters), dict(source._buffers)))
    student = replace(program, root=root, classes=_classes(program, chosen))
    return student, _patch(program, student, before, chosen, parameters)


def undo(student: Program, patch: Patch) -> Program:
    """The original, bit for bit: graphs, module names, parameters.

    Modules that the patch did not touch are taken from the student.
    """
    parents = map(parent_path, [*patch.taken, *patch.added, *(join(p, "_") for p in patch.order)])
    own = [p for p in (*patch.graphs, *parents) if exists(student.root, p)]
    root = with_own_paths(student.root, own)
    for path in patch.added:
        root.get_submodule(parent_path(path))._modules.pop(path.rpartition(".")[2], None)
    for path, module in patch.taken.items():
        set_module(root, path, module)
    for path, graph in patch.graphs.items():
        module = root.get_submodule(path)
        assert isinstance(module, fx.GraphModule)
        module.graph = copy_graph(graph)
    for path, (parameters, buffers) in patch.parameters.items():
        module = root.get_submodule(path)
        module._parameters, module._buffers = dict(parameters), dict(buffers)  # type: ignore[assignment]
    for path, names in patch.order.items():
        parent = root.get_submodule(path)
        parent._modules = {n: parent._modules[n] for n in names}
    return replace(student, root=root)


def _refitted(edit: Edit) -> list[str]:
    """Paths of the modules that stay and get other weights."""
    moved = [w[0].rpartition(".")[0] for w in edit.fold.weights] if edit.fold else []
    return [*moved, *(edit.stream.modules if edit.stream else ())]


def _classes(program: Program, edits: list[Edit]) -> dict[str, str]:
    """Class names of the student's modules: a copy's are its source's, a written operator's its own."""
    found = dict(program.classes)
    for new in (n for e in edits for n in e.new):
        below = [p for p in found if p == new.path or p.startswith(new.path + ".")]
        if new.copied is not None:
            source = new.copied.source
            for path, name in program.classes.items():
                if path == source or path.startswith(source + "."):
                    found[new.path + path[len(source) :]] = name
        elif new.spec.written is not None:
            for path in below:
                del found[path]
            found[new.path] = class_name(new.spec.name)
    return found


def _swap_parameters(
    root: fx.GraphModule, original: fx.GraphModule, paths: set[str]
) -> dict[str, Tensors]:
    """Takes out what rewritten graphs read and now do not; the parameters and buffers that they had."""
    had: dict[str, Tensors] = {}
    for path in paths:
        module, source = root.get_submodule(path), original.get_submodule(path)
        assert isinstance(module, fx.GraphModule)
        assert isinstance(source, fx.GraphModule)
        had[path] = (dict(source._parameters), dict(source._buffers))
        read, was_read = _read(module), _read(source)
        for tensors in (module._parameters, module._buffers):
            for name in [n for n in tensors if n in was_read and n not in read]:
                del tensors[name]
    return had


def _read(module: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}


def _is_opened(before: nn.Module, after: nn.Module) -> bool:
    """A graph whose ops now stand in its caller's is left as the mere holder of its parameters."""
    return isinstance(before, fx.GraphModule) and not isinstance(after, fx.GraphModule)


def _patch(
    program: Program,
    student: Program,
    before: Mapping[str, fx.Graph],
    edits: list[Edit],
    parameters: Mapping[str, Tensors],
) -> Patch:
    old = dict(program.root.named_modules(remove_duplicate=False))
    new = dict(student.root.named_modules(remove_duplicate=False))
    replaced = {n.path for e in edits for n in e.new} | {p for e in edits for p in _refitted(e)}
    gone = [
        p
        for p, module in old.items()
        if p and (p not in new or p in replaced or _is_opened(module, new[p]))
    ]
    top_gone = [p for p in gone if not any(p.startswith(g + ".") for g in gone)]
    added = [
        p
        for p in new
        if p and p not in old and not any(p.startswith(r + ".") for r in replaced if r in old)
    ]
    top_added = [p for p in added if not any(p.startswith(a + ".") for a in added)]
    parents = {parent_path(p) for p in (*top_gone, *top_added)}
    order = {p: tuple(old[p]._modules) for p in parents if p in old}
    return Patch(before, {p: old[p] for p in top_gone}, tuple(top_added), order, parameters)


APPLY: Mapping[str, Callable[[fx.GraphModule, Program, Edit, bool], None]] = {
    "replace": replace_site,
    "remove": remove_site,
    "skip": skip_block,
    "parallel": parallel_branches,
    "together": run_together,
    "insert": insert_after,
}
"""Edit kind → the function that makes it, on the student's own copy of the tree."""
