"""Regular repetition in a graph: a chain of blocks is a loop.

One turn of a loop is a few calls of modules in a row; what goes from turn to turn is the last
call's result; everything else that a turn reads stands before the loop. `zip` serves turns of
several calls, such as two blocks side by side and the module that merges them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import fx

_LONGEST_TURN = 4
_FEWEST_TURNS = 2


@dataclass(frozen=True)
class Run:
    """The members of the module list at `container` that the turns call, in order."""

    container: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """`turn` holds the calls of one turn; `nodes` all calls of all turns; `start` enters the first.

    `fixed` are the nodes that every turn reads besides.
    """

    turn: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    start: fx.Node
    runs: tuple[Run, ...]
    fixed: tuple[fx.Node, ...]


def find_loops(graph: fx.Graph) -> list[Loop]:
    """The loops of a graph, the longest first at each place; a node is in one at most."""
    calls = [n for n in graph.nodes if n.op == "call_module"]
    order = {n: i for i, n in enumerate(graph.nodes)}
    loops: list[Loop] = []
    i = 0
    while i < len(calls):
        found = [_loop_at(calls, i, length, order) for length in range(1, _LONGEST_TURN + 1)]
        best = max((f for f in found if f), key=lambda f: len(f.nodes), default=None)
        if best is None:
            i += 1
        else:
            loops.append(best)
            i += len([n for n in best.nodes if n.op == "call_module"])
    return loops


def _loop_at(calls: list[fx.Node], at: int, length: int, order: dict[fx.Node, int]) -> Loop | None:
    turn = calls[at : at + length]
    if len(turn) < length or not all(_member(n) for n in turn):
        return None
    start = _entry(turn)
    if start is None:
        return None
    turns = [turn]
    fixed = _fixed(turn, start)
    while True:
        following = calls[at + length * len(turns) : at + length * (len(turns) + 1)]
        if len(following) < length or not _repeats(turn, start, turns, following):
            break
        turns.append(following)
    if len(turns) < _FEWEST_TURNS:
        return None
    runs = [_run([t[j] for t in turns]) for j in range(length)]
    nodes = [n for t in turns for n in t]
    inside = set(nodes)
    leaves = any(u not in inside for n in nodes[:-1] for u in n.users)
    early = all(order[f] < order[nodes[0]] for f in fixed)
    if any(r is None for r in runs) or leaves or not early:
        return None
    return Loop(tuple(turn), tuple(nodes), start, tuple(r for r in runs if r), tuple(fixed))


def _member(node: fx.Node) -> bool:
    name = str(node.target).rpartition(".")
    return bool(name[0]) and name[2].isdigit() and not node.kwargs


def _entry(turn: list[fx.Node]) -> fx.Node | None:
    """What the first turn reads in place of the turn before: the first tensor of its first call."""
    inside = set(turn)
    for argument in turn[0].args:
        if isinstance(argument, fx.Node) and argument not in inside:
            candidates = [argument, *[a for a in turn[0].args if isinstance(a, fx.Node)]]
            after = [u for u in turn[-1].users if u.op == "call_module"]
            for candidate in candidates:
                position = turn[0].args.index(candidate)
                if any(len(u.args) > position and u.args[position] is turn[-1] for u in after):
                    return candidate
    return None


def _fixed(turn: list[fx.Node], start: fx.Node) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    for node in turn:
        for source in node.all_input_nodes:
            if source not in turn and source is not start:
                seen[source] = None
    return list(seen)


def _repeats(
    turn: list[fx.Node], start: fx.Node, turns: list[list[fx.Node]], following: list[fx.Node]
) -> bool:
    """Whether `following` does what `turn` does, reading the turn before where that reads `start`."""
    if not all(_member(n) for n in following):
        return False
    for a, b in zip(turn, following, strict=True):
        a_path, b_path = str(a.target).rpartition(".")[0], str(b.target).rpartition(".")[0]
        if a_path != b_path or len(a.args) != len(b.args):
            return False

        def moved(n: fx.Node) -> fx.Node:
            if n is start:
                return turns[-1][-1]
            return following[turn.index(n)] if n in turn else n

        if fx.map_arg(a.args, moved) != b.args:
            return False
    return True


def _run(nodes: list[fx.Node]) -> Run | None:
    container = str(nodes[0].target).rpartition(".")[0]
    indices = [int(str(n.target).rpartition(".")[2]) for n in nodes]
    rising = all(a < b for a, b in pairwise(indices))
    return Run(container, tuple(indices)) if rising else None
