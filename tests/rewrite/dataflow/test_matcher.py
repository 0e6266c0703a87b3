"""The matcher against networkx's VF2 on random graphs, and what a pattern can say."""

from __future__ import annotations

from itertools import product
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.isomorphism import DiGraphMatcher
from torch import fx

from graftc.diagnostics import GraftError, Source
from graftc.language.check import check
from graftc.language.dataflow_ops import OPS
from graftc.language.rules import DataflowMatch
from graftc.program.program import ATEN
from graftc.rewrite.dataflow.matcher import occurrences
from graftc.rewrite.dataflow.pattern import NodeRef, Pattern, ValueRef, patterns_of
from graftc.rewrite.dataflow.view import ProgramView, aten, forms, graph_ops, program_view

UNARY = {"relu": ATEN.relu.default, "neg": ATEN.neg.default}
BINARY = {"add": ATEN.add.Tensor, "sub": ATEN.sub.Tensor, "matmul": ATEN.matmul.default}


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    """A random graph of a few kinds of ops."""
    graph = fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(2)]
    for _ in range(draw(st.integers(2, 12))):
        name = draw(st.sampled_from([*UNARY, *BINARY]))
        operands = [draw(st.sampled_from(values)) for _ in range(1 if name in UNARY else 2)]
        values.append(graph.call_function({**UNARY, **BINARY}[name], tuple(operands)))
    graph.output(values[-1])
    return graph


@st.composite
def pattern_texts(draw: st.DrawFn) -> str:
    """A random connected pattern: lines that read earlier lines, outside names, choices and optional ops."""
    lines: list[str] = []
    made: list[str] = []
    for i in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([*UNARY, *BINARY, "(add | sub)", "(relu | neg)"]))
        count = 1 if name in (*UNARY, "(relu | neg)") else 2
        operands = [draw(st.sampled_from([*made, "a", "b"])) for _ in range(count)]
        if made and not set(operands) & set(made):
            operands[0] = draw(st.sampled_from(made))
        if draw(st.integers(0, 4)) == 0:
            operands[0] = f"maybe neg({operands[0]})"
        made.append(f"v{i}")
        lines.append(f"v{i} = {name}({', '.join(operands)})")
    return "\n".join(lines)


def parsed(text: str) -> tuple[Pattern, ...]:
    last = text.strip().splitlines()[-1].partition(" =")[0].strip()
    rules = check(
        Source("p.graft", f"rule r {{ match {{\n{text}\n}}\n rewrite {{ {last} = neg({last}) }} }}")
    )
    (match,) = rules.rules[0].matches
    assert isinstance(match, DataflowMatch)
    return patterns_of(match)


def by_vf2(pattern: Pattern, view: ProgramView) -> set[tuple[int, ...]]:
    """All monomorphisms of a pattern's ops, with the names outside checked by hand.

    A node of several names is tried under each, an op that commutes in both orders.
    """
    graph = nx.DiGraph()
    for op in view.flat.ops:
        if op.kind == "op":
            graph.add_node(op.index, op=view.op(op))
    for op in view.flat.ops:
        for at, operand in enumerate(view.args(op) or () if op.kind == "op" else ()):
            if operand in view.flat.ops and operand.kind == "op":
                places = graph.edges.get((operand.index, op.index), {}).get("at", frozenset())
                graph.add_edge(operand.index, op.index, at=places | {at})
    found: set[tuple[int, ...]] = set()
    for names in product(*(n.ops for n in pattern.nodes)):
        swaps = [[False, True] if OPS[op].commutes else [False] for op in names]
        for swapped in product(*swaps):
            args = {
                n.index: tuple(reversed(n.args[:2])) if swap else n.args
                for n, swap in zip(pattern.nodes, swapped, strict=True)
            }
            small = nx.DiGraph()
            for node, op in zip(pattern.nodes, names, strict=True):
                small.add_node(node.index, op=op)
            for index, operands in args.items():
                for at, operand in enumerate(operands):
                    if isinstance(operand, NodeRef):
                        places = small.edges.get((operand.index, index), {}).get("at", frozenset())
                        small.add_edge(operand.index, index, at=places | {at})
            matcher = DiGraphMatcher(
                graph, small,
                node_match=lambda g, p: g["op"] == p["op"],
                edge_match=lambda g, p: p["at"] <= g["at"],
            )  # fmt: skip
            for mapping in matcher.subgraph_monomorphisms_iter():
                placed = {p: g for g, p in mapping.items()}
                if names_agree(args, placed, view):
                    found.add(tuple(placed[i] for i in range(len(pattern.nodes))))
    return found


def names_agree(args: dict[int, Any], placed: dict[int, int], view: ProgramView) -> bool:
    """Each name outside is one value, and none that the pattern makes."""
    known: dict[str, Any] = {}
    for index, operands in args.items():
        actual = view.args(view.flat.ops[placed[index]])
        assert actual is not None
        for operand, value in zip(operands, actual, strict=True):
            if isinstance(operand, ValueRef):
                if known.setdefault(operand.name, value) is not value:
                    return False
                if value.index in placed.values():
                    return False
    return True


@settings(max_examples=300, deadline=None)
@given(graphs(), pattern_texts())
def test_the_same_matches_as_vf2_always(graph: fx.Graph, text: str) -> None:
    view = program_view(graph_ops(graph))
    for pattern in parsed(text):
        ours = [tuple(v.index for v in o.values) for o in occurrences(pattern, view)]
        assert set(ours) == by_vf2(pattern, view)


def test_every_form_of_every_op_is_one_of_this_torch() -> None:
    missing = [f.target for w in OPS.values() for f in w.forms if aten(f.target) is None]
    assert not missing
    assert len(forms()) == sum(len(w.forms) for w in OPS.values())


def found(text: str, graph: fx.Graph) -> int:
    view = program_view(graph_ops(graph))
    return len(
        {tuple(v.index for v in o.values) for p in parsed(text) for o in occurrences(p, view)}
    )


def traced(function: Any, *inputs: torch.Tensor) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(*inputs).graph
    for node in graph.nodes:
        if "tensor_meta" in node.meta:
            node.meta["val"] = node.meta["val"]
    return graph


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("text", "function", "count"),
    [
        ("y = x + 1", lambda x: 1 + x, 1),
        ("y = 1 - x", lambda x: 1 - x, 1),
        ("y = x * x", lambda x: x * x + x * 2, 1),
        ("y = mean(x, -1, true)", lambda x: x.mean((2,), keepdim=True), 1),
        ("y = mean(x, -1)", lambda x: x.mean(1), 0),
        ("y = transpose(x, -1, -2)", lambda x: x.transpose(1, 2), 1),
        ("y = neg(not relu(x))", lambda x: -torch.relu(x), 0),
        ("y = neg(not relu(x))", lambda x: -torch.sin(x), 1),
        ("y = cat(args…, dim = -1)", lambda x: torch.cat([x, x * 2, x * 3], 2), 1),
        ("y = cat(x, x, 2)", lambda x: torch.cat([x, x], 2), 0),
        ("y = cat(x, x, dim = 2)", lambda x: torch.cat([x, x], 2), 1),
        ("y = aten.sin(x)", lambda x: torch.sin(x), 1),
        ("y = add(x, 0.70710678)", lambda x: x + 0.5**0.5, 1),
        ("y = add(x, 0.7071)", lambda x: x + 0.5**0.5, 0),
        ("y = x + z", lambda x: torch.add(x, x * 2, alpha=3), 0),
    ],
)
def test_what_a_pattern_says(text: str, function: Any, count: int) -> None:
    assert found(text, traced(function, X)) == count


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("y = sofmax(x, -1)", "G371"),
        ("y = softmax(x)", "G372"),
        ("y = softmax(x, -1, none, 2)", "G372"),
        ("y = softmax(x, dims = -1)", "G373"),
        ("y = x", "G374"),
        ("y = relu(x)\nz = neg(w)", "G376"),
        ("y = detach(x)", "G378"),
        ("y = relu(z)\nz = neg(x)", "G113"),
    ],
)
def test_a_wrong_pattern_is_refused_where_it_is_wrong(text: str, code: str) -> None:
    with pytest.raises(GraftError) as error:
        parsed(text)
    assert error.value.diagnostics[0].code == code
    assert error.value.diagnostics[0].span is not None
