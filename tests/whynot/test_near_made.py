"""Near misses made by machine: every op of a match is changed in every way, one at a time and two at a time.

The batteries beside this file are written by hand; here nobody chose the cases.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

from graftc.rewrite.dataflow.view import graph_ops, program_view
from graftc.rewrite.whynot.change import Miss
from graftc.rewrite.whynot.dataflow import dataflow_misses
from tests.whynot.test_near_dataflow import RULES, rule, traced

ATEN = torch.ops.aten
UNARY = {ATEN.softmax.int, ATEN.erf.default, ATEN.silu.default, ATEN.rsqrt.default}
# What a change must be called: the kinds that are right for it.
Mutation = tuple[str, str, set[str]]


def ops(graph: fx.Graph) -> list[fx.Node]:
    """The ops of the match: not the tail that `traced` adds."""
    found = [n for n in graph.nodes if n.op == "call_function"]
    end = next(i for i, n in enumerate(found) if n.target is ATEN.cos.default)
    return [n for n in found[:end] if n.target is not ATEN.zeros.default]


def other_op(graph: fx.Graph, node: fx.Node) -> bool:
    if node.target not in UNARY:
        return False
    with graph.inserting_after(node):
        new = graph.call_function(ATEN.relu.default, (node.args[0],))
    node.replace_all_uses_with(new)
    new.meta, node.meta = dict(node.meta), {}
    graph.erase_node(node)
    return True


def extra_op(graph: fx.Graph, node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    users = list(node.users)
    with graph.inserting_after(node):
        new = graph.call_function(ATEN.abs.default, (node,))
    new.meta = dict(node.meta)
    inside = [u for u in users if u in ops(graph)]
    for user in inside:
        user.replace_input_with(node, new)
    return bool(inside)


def constant(graph: fx.Graph, node: fx.Node) -> bool:
    if not any(isinstance(a, float) for a in node.args):
        return False
    node.args = tuple(a * 3 + 1 if isinstance(a, float) else a for a in node.args)
    return True


def leaks(graph: fx.Graph, node: fx.Node) -> bool:
    inner = [u for u in node.users if u in ops(graph)]
    if not inner:
        return False
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        new = graph.call_function(ATEN.sin.default, (node,))
    new.meta = dict(node.meta)
    output.args = ((output.args[0], new),)
    return True


def turned(graph: fx.Graph, node: fx.Node) -> bool:
    """The operands of a subtraction the other way round: one that can be told, since one of them is an op."""
    if node.target is not ATEN.sub.Tensor:
        return False
    node.args = (node.args[1], node.args[0])
    return True


WAYS: dict[str, tuple[Callable[[fx.Graph, fx.Node], bool], set[str]]] = {
    "other": (other_op, {"op"}),
    "extra": (extra_op, {"extra", "same"}),
    "constant": (constant, {"constant"}),
    "leak": (leaks, {"outside"}),
    "turned": (turned, {"order"}),
}


def base(name: str) -> fx.Graph:
    flat = traced(name, [RULES[name]["good"]], square=False)
    return flat.ops[0].node.graph


def mutated(name: str, count: int, seed: int) -> Iterator[tuple[str, fx.Graph, list[set[str]]]]:
    """Graphs with `count` changes: all of them for one, a seeded sample for two."""
    graph = base(name)
    size = len(ops(graph))
    single = [(i, way) for i in range(size) for way in WAYS]
    rng = random.Random(seed)
    chosen: list[list[tuple[int, str]]] = [[c] for c in single]
    if count == 2:
        pairs = [[a, b] for a in single for b in single if a[0] < b[0]]
        chosen = rng.sample(pairs, min(60, len(pairs)))
    for changes in chosen:
        made = copy.deepcopy(graph)
        nodes = ops(made)
        done = [WAYS[way][0](made, nodes[i]) for i, way in changes]
        if all(done):
            said = ", ".join(f"{way} {nodes[i].name}" for i, way in changes)
            yield f"{name}: {said}", made, [WAYS[way][1] for _, way in changes]


def first(name: str, graph: fx.Graph) -> Miss | None:
    return next(iter(dataflow_misses(rule(name), program_view(graph_ops(graph)))), None)


def shares(count: int) -> tuple[float, list[str]]:
    wrong: list[str] = []
    total = 0
    for name in RULES:
        for said, graph, kinds in mutated(name, count, seed=0):
            total += 1
            miss = first(name, graph)
            found: list[Any] = [c.kind for c in miss.changes] if miss else []
            right = len(found) == count and all(any(k in found for k in ks) for ks in kinds)
            if not right:
                wrong.append(f"{said} -> {miss.text if miss else 'nothing'}")
    assert total >= 30
    return 1 - len(wrong) / total, wrong


@pytest.mark.parametrize(("count", "share"), [(1, 0.95), (2, 0.88)], ids=["single", "in pairs"])
def test_the_first_line_is_right(count: int, share: float) -> None:
    found, wrong = shares(count)
    assert found >= share, "\n".join(wrong)
