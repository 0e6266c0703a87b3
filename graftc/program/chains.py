"""Chains of blocks: runs of like modules, each fed by the one before, told from the graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from graftc.program.flat import LINEAR_COUNT
from graftc.program.program import Program, join, shape_hint, size_hint, structure_hash, value


@dataclass(frozen=True)
class Chain:
    """Blocks in the order of the data flow.

    `name`: the container they share; `paths`: the blocks; `graph`: the path of the graph that calls them;
    `nodes`: names of their calls in it; `streams`: which argument of each block is the residual stream.
    A block that runs several times stands once, where it runs first.
    """

    name: str
    graph: str
    paths: tuple[str, ...]
    nodes: tuple[str, ...]
    streams: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


def chains(program: Program) -> tuple[Chain, ...]:
    """Every chain of at least two blocks, outermost first."""
    memo: dict[int, str] = {}
    found: list[Chain] = []
    inside: set[str] = set()
    for path, module in program.graphs():
        if path in inside or any(above in inside for above in _above(path)):
            continue  # inside a block: a Sequential of linears is no chain of blocks
        here = _chains_of(path, module, memo)
        inside.update(p for c in here for p in c.paths)
        found += here
    return tuple(found)


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that hold a module, nearest first."""
    while path := path.rpartition(".")[0]:
        yield path


def _chains_of(path: str, module: fx.GraphModule, memo: dict[int, str]) -> list[Chain]:
    links: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in module.graph.nodes:
        if node.op == "call_module" and _is_block_like(module, node):
            for user, used in _uses(node):
                if (
                    user.op == "call_module"
                    and _is_block_like(module, user)
                    and _kind(module, node, memo) & _kind(module, user, memo)
                    and shape_hint(used) in _result_shapes(user)
                ):
                    links.add_edge(node, user)
    found: list[Chain] = []
    for component in nx.weakly_connected_components(links):
        run = list(nx.dag_longest_path(links.subgraph(component)))
        distinct = list(
            {id(module.get_submodule(str(n.target))): n for n in reversed(run)}.values()
        )
        distinct.reverse()
        streams = _streams(run)
        found.append(
            Chain(
                _name([str(n.target) for n in distinct], path),
                path,
                tuple(join(path, str(n.target)) for n in distinct),
                tuple(n.name for n in distinct),
                tuple(streams[n] for n in distinct),
            )
        )
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    names = {n.name: i for n, i in order.items()}
    return sorted(found, key=lambda c: names[c.nodes[0]])


def _is_block_like(module: fx.GraphModule, node: fx.Node) -> bool:
    inner = module.get_submodule(str(node.target))
    return isinstance(inner, fx.GraphModule) and _count_linears(inner) >= LINEAR_COUNT


def _count_linears(module: fx.GraphModule) -> int:
    cached = module.meta.get("graftc_linears")
    if cached is None:
        cached = sum(1 for p in module.parameters() if p.ndim >= 2)
        module.meta["graftc_linears"] = cached
    return cached


def _kind(module: fx.GraphModule, node: fx.Node, memo: dict[int, str]) -> set[str]:
    """What makes two modules alike: the container they are numbered in, or their structure."""
    name = str(node.target)
    container, _, last = name.rpartition(".")
    kinds = {structure_hash(module.get_submodule(name), memo)}
    if last.isdigit() and container:
        kinds.add(f"in {container}")
    return kinds


def _uses(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(user, the value it uses): the node's result, or an item of it."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem:
            found += [(u, user) for u in user.users]
        else:
            found.append((user, node))
    return found


def _result_shapes(node: fx.Node) -> set[tuple[int, ...]]:
    """Shapes of the tensors that a call returns."""
    val = value(node)
    items = val if isinstance(val, (tuple, list)) else (val,)
    return {tuple(size_hint(s) for s in v.shape) for v in items if isinstance(v, torch.Tensor)}


def _streams(run: list[fx.Node]) -> dict[fx.Node, int]:
    """Which argument of each call is the stream: what comes from the call before, of the first what has its shape.

    Calls of one chain may order their inputs differently: a block without cross-attention takes no context.
    """
    found: dict[fx.Node, int] = {}
    for before, after in itertools.pairwise(run):
        values = {value for user, value in _uses(before) if user is after}
        found[after] = next(i for i, a in enumerate(after.args) if a in values)
    first, second = run[0], run[1]
    wanted = _shape_of(second.args[found[second]])
    alike = [i for i, a in enumerate(first.args) if _shape_of(a) == wanted]
    same = found[second]
    found[first] = alike[0] if alike and same not in alike else same
    return found


def _shape_of(argument: object) -> tuple[int, ...] | None:
    return shape_hint(argument) if isinstance(argument, fx.Node) else None


def _name(targets: list[str], path: str) -> str:
    containers = {t.rpartition(".")[0] for t in targets}
    if len(containers) == 1 and (container := containers.pop()):
        return join(path, container)
    stem = targets[0].rstrip("0123456789_.")
    return join(path, stem or targets[0])
