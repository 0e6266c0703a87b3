"""Moving nodes across module boundaries: inlining a call, and making a module of some nodes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from graftc.program.dropout import NOTED, hand_over, left_behind
from graftc.program.program import value


class Nodes:
    """Where a node went: nodes are replaced by copies as graphs are rebuilt."""

    def __init__(self) -> None:
        self._to: dict[fx.Node, fx.Node] = {}
        self._from: dict[fx.Node, fx.Node] = {}
        self.inlined: set[fx.Node] = set()

    def move(self, old: fx.Node, new: fx.Node) -> None:
        self._to[old] = new
        self._from[new] = old

    def __getitem__(self, node: fx.Node) -> fx.Node:
        """The node that stands for `node` now."""
        while node in self._to:
            node = self._to[node]
        return node

    def origin(self, node: fx.Node) -> fx.Node:
        """The node that `node` was in the beginning."""
        while node in self._from:
            node = self._from[node]
        return node


def inline_call(owner: fx.GraphModule, call: fx.Node, nodes: Nodes) -> None:
    """Put the graph of a called module in the place of its call; the module stays as a container."""
    target = str(call.target)
    inner = owner.get_submodule(target)
    assert isinstance(inner, fx.GraphModule)
    given = iter(call.args)
    copies: dict[fx.Node, Any] = {}
    with owner.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op != "output":
                copy = owner.graph.node_copy(node, lambda n: copies[n])
                if node.op in ("call_module", "get_attr"):
                    copy.target = f"{target}.{node.target}"
                copies[node] = copy
                nodes.move(node, copy)
    returned = next(n for n in inner.graph.nodes if n.op == "output").args[0]
    results: Any = fx.map_arg(returned, lambda n: copies[n])
    if isinstance(results, fx.Node):
        call.replace_all_uses_with(results)
    else:
        for user in list(call.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            owner.graph.erase_node(user)
    owner.graph.erase_node(call)
    nodes.inlined.add(call)
    if not any(n.op == "call_module" and n.target == target for n in owner.graph.nodes):
        dissolve(owner, target)


def dissolve(owner: nn.Module, target: str) -> None:
    """Let a module that is no longer called hold its parts as a plain container."""
    module = owner.get_submodule(target)
    plain = nn.Module()
    plain._parameters = module._parameters
    plain._buffers = module._buffers
    plain._non_persistent_buffers_set = module._non_persistent_buffers_set
    plain._modules = module._modules
    parent, _, name = target.rpartition(".")
    owner.get_submodule(parent)._modules[name] = plain


def outline_nodes(
    owner: fx.GraphModule, chosen: list[fx.Node], name: str, firsts: list[fx.Node], nodes: Nodes
) -> dict[str, str] | None:
    """Make a module of some nodes of a graph; the new → old names of what moved into it.

    None, with nothing changed, where they are not a region with inputs before it and results after it.
    """
    inside = set(chosen)
    order = {n: i for i, n in enumerate(owner.graph.nodes)}
    chosen = sorted(chosen, key=lambda n: order[n])
    exits = [n for n in chosen if any(u not in inside for u in n.users)]
    if not exits:
        return None
    last = chosen[-1]
    early = [u for e in exits for u in e.users if u not in inside and order[u] < order[last]]
    ahead = [n for n in chosen if n in firsts] + chosen
    inputs = list(dict.fromkeys(i for n in ahead for i in n.all_input_nodes if i not in inside))
    if early or any(order[i] > order[last] for i in inputs):
        return None
    local = _free_name(owner, name)
    made, copies = _graph_of(chosen, inputs, exits)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    names = _move_parts(owner, module, chosen, inside, local)
    module.graph = made
    with owner.graph.inserting_after(last):
        call = owner.graph.create_node("call_module", local, tuple(inputs), name=local)
    owner.add_module(local, module)
    for exit_, result in zip(exits, _reconnect(owner.graph, call, exits, inside), strict=True):
        if not any(u in inside for u in exit_.users):
            hand_over(
                exit_, result
            )  # what is dropped of the region's result is no part of the region
            copies[exit_].meta[NOTED] = left_behind(copies[exit_])
    for node in reversed(chosen):
        owner.graph.erase_node(node)
        nodes.move(node, copies[node])
    return names


def _graph_of(
    chosen: list[fx.Node], inputs: list[fx.Node], exits: list[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in chosen:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    returned: list[fx.Node] = [copies[e] for e in exits]
    graph.output(tuple(returned) if len(returned) > 1 else returned[0])
    return graph, copies


def _reconnect(
    graph: fx.Graph, call: fx.Node, exits: list[fx.Node], inside: set[fx.Node]
) -> list[fx.Node]:
    """Let the others read the call's results in place of the exits; the results."""
    if len(exits) == 1:
        call.meta["val"] = value(exits[0])
        results = [call]
    else:
        call.meta["val"] = tuple(value(e) for e in exits)
        results: list[fx.Node] = []
        for i, exit_ in reversed(list(enumerate(exits))):
            with graph.inserting_after(call):
                item = graph.call_function(operator.getitem, (call, i))
            item.meta["val"] = value(exit_)
            results.insert(0, item)
    for exit_, result in zip(exits, results, strict=True):
        exit_.replace_all_uses_with(result, delete_user_cb=lambda u: u not in inside)
    return results


def _move_parts(
    owner: fx.GraphModule,
    module: nn.Module,
    chosen: list[fx.Node],
    inside: set[fx.Node],
    local: str,
) -> dict[str, str]:
    """Register under the new module what its nodes call and read; take it from the old place if nobody else does."""
    names: dict[str, str] = {}
    every = dict.fromkeys(str(n.target) for n in chosen if n.op in ("call_module", "get_attr"))
    # A weight that is read beside its module's call (for its dtype) goes with the module.
    targets = [t for t in every if not any(t.startswith(f"{o}.") for o in every)]
    left = {
        str(n.target)
        for n in owner.graph.nodes
        if n.op in ("call_module", "get_attr") and n not in inside
    }
    for target in targets:
        parent, _, last = target.rpartition(".")
        source = owner.get_submodule(parent)
        place = _container(module, parent)
        shared = any(t == target or t.startswith(target + ".") for t in left)
        for kind in ("_modules", "_parameters", "_buffers"):
            if last in getattr(source, kind):
                getattr(place, kind)[last] = getattr(source, kind)[last]
                if kind == "_buffers" and last in source._non_persistent_buffers_set:
                    place._non_persistent_buffers_set.add(last)
                if not shared:
                    del getattr(source, kind)[last]
        names[f"{local}.{target}"] = target
        _prune(owner, parent, left)
    return names


def _container(module: nn.Module, path: str) -> nn.Module:
    for part in [p for p in path.split(".") if p]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def _prune(owner: nn.Module, path: str, called: set[str]) -> None:
    """Containers that hold nothing any more leave the tree."""
    while path:
        module = owner.get_submodule(path)
        if path in called or module._modules or module._parameters or module._buffers:
            return
        parent, _, name = path.rpartition(".")
        del owner.get_submodule(parent)._modules[name]
        path = parent


def _free_name(owner: nn.Module, name: str) -> str:
    taken = {*owner._modules, *owner._parameters, *owner._buffers, *vars(owner), *dir(type(owner))}
    free, i = name, 1
    while free in taken:
        free, i = f"{name}_{i}", i + 1
    return free
