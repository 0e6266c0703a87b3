"""Matching: microseconds a node, on chains of 28, 280 and 2,800 blocks of 20 nodes, against torch.fx's own matcher.

    python benchmarks/matching.py

The model is the same for both: pre-norm transformer blocks of 20 ops. graftc matches rules over its Analysis; torch.fx matches a
pattern graph over the flat graph of the model (`SubgraphMatcher`, what `torch.fx.subgraph_rewriter` runs), whose time grows with the
square of the chain: it is stopped at a cap, and then NOT RUN.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timing import OutOfTimeError, Report, capped
from torch import Tensor, fx, nn
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

import graftc
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.program import Program
from graftc.rewrite.match import match

LENGTHS = (28, 280, 2800)
NODES = 20
DIM, HEADS = 8, 2
RULES = {
    "role": "match a = self_attention in blocks all\n replace a with attention()",
    "role, sparse": "match a = self_attention in blocks odd\n replace a with attention()",
    "path": 'match a = module "blocks.*.mlp"\n replace a with mlp(ratio = 2)',
    "pairs": "match a, b = each pair of blocks all\n replace with parallel(a, b, merge = linear)",
}


class Attention(nn.Module):
    """13 ops."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).view(2, 4, HEADS, DIM // HEADS).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, DIM))


class Mlp(nn.Module):
    """3 ops."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """20 ops: two norms, an attention, an MLP, two sums."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(DIM),
            Attention(),
            nn.LayerNorm(DIM),
            Mlp(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Chain(nn.Module):
    """`length` blocks, one after the other."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def program(length: int, shared: bool = False) -> Program:
    """A Program of `length` blocks: one of two is captured, and its second block copied, for torch.export takes minutes at 2,800.

    `shared`: the block is run `length` times and not copied, for the copies alone take a minute: the ops are as many,
    each with values of its own, and only the weights are the same.
    """
    small = capture(graftc.Model(Chain(2), {"x": torch.zeros(2, 4, DIM)}, dynamic={"x": {}}))
    holder = nn.Module()
    block = small.module("blocks.1")
    holder.blocks = nn.ModuleList(block if shared else copy.deepcopy(block) for _ in range(length))
    graph = fx.Graph()
    calls = {n.target: n for n in small.root.graph.nodes if n.op == "call_module"}
    before = next(n for n in small.root.graph.nodes if n.op == "placeholder")
    node = graph.placeholder("x")
    node.meta.update(before.meta)
    for index in range(length):
        node = graph.call_module(f"blocks.{index}", (node,))
        node.meta.update(calls["blocks.1"].meta)
    graph.output(node)
    classes = {
        f"blocks.{i}{p.removeprefix('blocks.1')}": c
        for p, c in small.classes.items()
        if p.startswith("blocks.1")
        for i in range(length)
    }
    return replace(small, root=fx.GraphModule(holder, graph), classes=classes)


class Flattener(fx.Tracer):
    """Traces through every module: torch.fx's matcher compares a module's call by its name, so a pattern must be of functions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def flat_graph(length: int) -> fx.Graph:
    """The same blocks as one flat graph; weights are `get_attr` nodes and not counted among the 20."""
    block = Flattener().trace(Block())
    graph = fx.Graph()
    value = graph.placeholder("x")
    start = next(n for n in block.nodes if n.op == "placeholder")
    for _ in range(length):
        value = graph.graph_copy(block, {start: value})
    graph.output(value)
    return graph


def attention_pattern(
    x: Tensor,
    q: Tensor,
    qb: Tensor,
    k: Tensor,
    kb: Tensor,
    v: Tensor,
    vb: Tensor,
    o: Tensor,
    ob: Tensor,
) -> Tensor:
    """What `Attention` does, its weights being inputs: to torch.fx's matcher an input fits anything."""
    heads = (
        F.linear(x, w, b).view(2, 4, HEADS, DIM // HEADS).transpose(1, 2)
        for w, b in ((q, qb), (k, kb), (v, vb))
    )
    return F.linear(
        F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 4, DIM), o, ob
    )


def mlp_pattern(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """What `Mlp` does."""
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="none"), down, down_bias)


def torch_matcher(pattern: Callable[..., Tensor]) -> Callable[[fx.Graph], list[Any]]:
    """torch.fx's matcher, as `torch.fx.subgraph_rewriter` sets it up."""
    return SubgraphMatcher(
        fx.symbolic_trace(pattern).graph,
        match_output=False,
        match_placeholder=False,
        remove_overlapping_matches=True,
    ).match


def best(run: Callable[[], object], repeats: int) -> float:
    """The fastest of a few calls: matching is deterministic, and whatever else runs only adds."""
    gc.collect()
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(lengths: tuple[int, ...] = LENGTHS, cap: int = 60) -> Report:
    """All lengths; torch.fx's matcher is stopped after `cap` seconds."""
    rows: list[tuple[str, ...]] = []
    rules = {name: check("rule r {\n " + text + "\n}").rules[0] for name, text in RULES.items()}
    for length in lengths:
        nodes = length * NODES
        made = program(length)
        analysing = best(lambda p=made: analyse(p), 1 if length > 1000 else 3)
        analysis: Analysis = analyse(made)
        found = {
            name: best(lambda r=rule, a=analysis: match(r, a), 5) for name, rule in rules.items()
        }
        flat = flat_graph(length)
        assert sum(n.op in ("call_function", "call_method") for n in flat.nodes) == nodes
        theirs: dict[str, float | None] = {}
        for name, pattern in (("attention", attention_pattern), ("MLP", mlp_pattern)):
            run = torch_matcher(pattern)
            try:
                theirs[name] = capped(lambda f=run, g=flat: f(g), cap)
            except OutOfTimeError:
                theirs[name] = None
        slowest = max(found.values())
        rows.append(
            (
                f"{length:,}", f"{nodes:,}",
                *(f"{1e6 * s / nodes:.2f}" for s in found.values()),
                f"{1e6 * analysing / nodes:.0f}",
                *(f"NOT RUN (> {cap} s)" if s is None else f"{1e6 * s / nodes:.0f}" for s in theirs.values()),
                *(f"> {cap / slowest:,.0f}x" if s is None else f"{s / slowest:,.0f}x" for s in theirs.values()),
            )
        )  # fmt: skip
    return Report(
        "Matching, in µs a node",
        (
            "blocks", "nodes", *(f"graftc: {name}" for name in RULES), "graftc: analysis, once a model",
            "torch.fx: attention", "torch.fx: MLP", "torch.fx attention / slowest graftc", "torch.fx MLP / slowest graftc",
        ),
        tuple(rows),
        (
            "Goal: matching at most 3 µs a node. A rule's match over an Analysis (`graftc.rewrite.match.match`), the fastest of 5; the "
            "Analysis (roles and chains, told from dataflow) is made once a model, whatever the number of rules, and stands in its own column. "
            "torch.fx: `SubgraphMatcher` of the same attention or MLP as a pattern, over the same blocks as one flat graph.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
