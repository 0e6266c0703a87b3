"""Copy-on-write for a tree of graph modules: what an edit does not touch is shared."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from graftc.program.program import join


def with_own_paths(root: fx.GraphModule, touched: Iterable[str]) -> fx.GraphModule:
    """A tree where every module on the way to a touched path is its own copy (graphs too).

    Parameters, and modules off these ways, are shared with `root`, which stays as it is. A module
    that stands in the tree under several paths stays one module.
    """
    own: set[str] = {""}
    for path in touched:
        parts = path.split(".") if path else []
        own |= {".".join(parts[:i]) for i in range(len(parts) + 1)}
    owned = {id(root.get_submodule(p)) for p in own}
    memo: dict[int, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if id(module) in memo:
            return memo[id(module)]
        if id(module) not in owned and not any(id(m) in owned for m in module.modules()):
            memo[id(module)] = module
            return module
        shell = shallow(module)
        memo[id(module)] = shell
        for name, child in module._modules.items():
            if child is not None:
                shell._modules[name] = copy(child)
        return shell

    result = copy(root)
    assert isinstance(result, fx.GraphModule)
    return result


def shallow(module: nn.Module) -> nn.Module:
    """A module of the same kind with the same parameters and children and, for a graph module, a copy of its graph."""
    if not isinstance(module, fx.GraphModule):
        shell = nn.Module()
    else:
        shell = fx.GraphModule(nn.Module(), fx.Graph())
        shell.graph = copy_graph(module.graph)
    shell._parameters = dict(module._parameters)
    shell._buffers = dict(module._buffers)
    shell._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    shell._modules = dict(module._modules)
    shell.training = module.training
    return shell


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have the same names and share the recorded values (never deep-copied)."""
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph, values)
    for node, twin in values.items():
        twin.meta = dict(node.meta)
    copied.output(output)
    return copied


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path; containers on the way are made where they are missing."""
    parent, _, name = path.rpartition(".")
    holder = root
    for part in parent.split(".") if parent else []:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        child = holder._modules[part]
        assert child is not None
        holder = child
    holder._modules[name] = module


def prune(root: fx.GraphModule, original: fx.GraphModule) -> None:
    """Take away the modules that `original` reached through calls and `root` no longer does.

    What the original never called stays, and nothing that the two trees share is changed.
    """
    used, before = _reached(root), _reached(original)
    shared = {id(m) for m in original.modules()}

    def visit(module: nn.Module, path: str) -> None:
        for name, child in list(module._modules.items()):
            where = join(path, name)
            if child is None or (id(child) in shared and where in used):
                continue  # nothing in a shared graph was changed
            if where in used:
                if isinstance(child, fx.GraphModule):
                    visit(child, where)
            elif _any_under(used, where):
                # Nothing calls it, but something below it is used: it stays as a mere container.
                holder = nn.Module()
                holder._modules = dict(child._modules)
                holder._parameters = {
                    n: p for n, p in child._parameters.items() if join(where, n) in used
                }
                holder._buffers = {
                    n: b for n, b in child._buffers.items() if join(where, n) in used
                }
                holder._non_persistent_buffers_set = set(child._non_persistent_buffers_set)
                module._modules[name] = holder
                visit(holder, where)
            elif where in before or _any_under(before, where):
                del module._modules[name]

    visit(root, "")


def _any_under(paths: set[str], where: str) -> bool:
    return any(p.startswith(where + ".") for p in paths)


def _reached(root: fx.GraphModule) -> set[str]:
    """Paths of the modules and tensors that the root's graph reaches through calls."""
    reached: set[str] = set()
    stack = [""]
    while stack:
        path = stack.pop()
        module = root.get_submodule(path)
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                where = join(path, str(node.target))
                if where not in reached:
                    reached.add(where)
                    if node.op == "call_module":
                        stack.append(where)
    return reached
