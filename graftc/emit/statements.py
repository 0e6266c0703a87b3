"""A graph as a list of statements: what is assigned, what is written in place, what is a loop."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from graftc.emit.expressions import expression, is_mutating, is_random
from graftc.emit.literals import Operand, literal
from graftc.emit.loops import Loop
from graftc.emit.names import operation

# A statement longer than this, or with more operations, is cut in two.
_WIDEST = 86
_MOST_OPERATIONS = 8


@dataclass
class Statement:
    """`node` is evaluated here; `parts` are the getitems it is unpacked into, by index."""

    node: fx.Node
    parts: dict[int, fx.Node] = field(default_factory=dict[int, fx.Node])
    size: int = 0
    loop: Loop | None = None


@dataclass(frozen=True)
class Layout:
    """Statements in order; the nodes written inside the statement of their one user; last uses."""

    statements: list[Statement]
    inlined: frozenset[fx.Node]
    last_use: Mapping[fx.Node, int]

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The variables that a node's expression reads, seen through what is inlined."""
        found: list[fx.Node] = []
        for source in node.all_input_nodes:
            found += self.sources(source) if source in self.inlined else [source]
        return found


def layout(graph: fx.Graph, loops: list[Loop], access: Mapping[str, ast.expr], site: str) -> Layout:
    """The statements of `graph`; a loop stands where its last call stands."""
    in_loop = {n: loop for loop in loops for n in loop.nodes}
    unpacked = {n: _unpacking(n) for n in graph.nodes if n not in in_loop}
    inlined = _candidates(graph, in_loop, unpacked, loops)
    while True:
        cut = _too_long(graph, inlined, access, site)
        if cut is None:
            break
        inlined.discard(cut)
    statements: list[Statement] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in inlined or _is_part(node, unpacked):
            continue
        loop = in_loop.get(node)
        if loop is not None:
            if node is loop.nodes[-1]:
                statements.append(Statement(node, loop=loop))
            continue
        parts, size = unpacked[node] or ({}, 0)
        statements.append(Statement(node, parts, size))
    made = Layout(statements, frozenset(inlined), {})
    return Layout(statements, made.inlined, _last_uses(graph, made))


def tuple_size(node: fx.Node) -> int | None:
    """How many values a node gives, None if it is one tensor or not known."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return len(value)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(node.target, torch._ops.OpOverload) and "chunk" in str(node.target):
        indices = [u.args[1] for u in node.users if u.target is operator.getitem]
        if node.args[1:] and set(indices) == set(range(int(str(node.args[1])))):
            return len(set(indices))
    return None


def _unpacking(node: fx.Node) -> tuple[dict[int, fx.Node], int] | None:
    """The parts of `a, b = …` and how many values there are, None where it cannot be so written."""
    users = list(node.users)
    if not users or any(u.target is not operator.getitem or u.args[0] is not node for u in users):
        return None
    parts = {u.args[1]: u for u in users if isinstance(u.args[1], int)}
    size = tuple_size(node)
    if len(parts) != len(users) or len(parts) < 2 or size is None or max(parts) >= size:
        return None
    if size - len(parts) > 2:
        return None
    return {int(str(k)): v for k, v in parts.items()}, size


def _is_part(
    node: fx.Node, unpacked: Mapping[fx.Node, tuple[dict[int, fx.Node], int] | None]
) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return unpacked.get(node.args[0]) is not None


def _candidates(
    graph: fx.Graph,
    in_loop: Mapping[fx.Node, Loop],
    unpacked: Mapping[fx.Node, tuple[dict[int, fx.Node], int] | None],
    loops: list[Loop],
) -> set[fx.Node]:
    always = {
        n for n in graph.nodes
        if n.op == "get_attr" or (n.op == "call_function" and n.target is getattr)
    }  # fmt: skip
    if any(is_mutating(n) for n in graph.nodes):
        return always  # moving a read past a write would change it
    starts = {loop.start for loop in loops}
    ordered = {n for n in graph.nodes if is_random(n)}
    found = set(always)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        if node in in_loop or node in starts or node in ordered or _is_part(node, unpacked):
            continue
        if unpacked[node] is not None or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        if loops and operation(node) == "sym_size":
            continue  # `batch = x.shape[0]` stands before x becomes something else
        if _occurrences(user, node) == 1 and not _stands_alone(node, user):
            found.add(node)
    return found


def _stands_alone(node: fx.Node, user: fx.Node) -> bool:
    """q, k and v have their names, however short they are."""
    attention = operation(user) == "scaled_dot_product_attention"
    return attention and any(a is node for a in user.args[:3])


def _occurrences(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def see(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is node
        return n

    fx.map_arg((user.args, dict(user.kwargs)), see)
    return count


def _too_long(
    graph: fx.Graph, inlined: set[fx.Node], access: Mapping[str, ast.expr], site: str
) -> fx.Node | None:
    """A node to take out of a statement that is too long, the one nearest to its middle."""
    for node in graph.nodes:
        if node.op == "placeholder" or node in inlined:
            continue
        inner = _inner(node, inlined)
        if not inner or _is_short(node, inner, inlined, access, site):
            continue
        if node.op == "output" and len(node.all_input_nodes) > 1:
            return next(
                v for v in node.all_input_nodes if v in inlined and not _is_brief(v, inlined)
            )
        half = (len(inner) + 1) / 2
        return min(inner, key=lambda n: abs(len(_inner(n, inlined)) + 1 - half))
    return None


def _is_short(
    node: fx.Node,
    inner: list[fx.Node],
    inlined: set[fx.Node],
    access: Mapping[str, ast.expr],
    site: str,
) -> bool:
    def name(_: fx.Node) -> ast.expr:
        return ast.Name("_" * 10)

    if node.op != "output":
        written_out = written(node, inlined, name, access, site)
        return len(inner) < _MOST_OPERATIONS and len(ast.unparse(written_out)) <= _WIDEST
    values = [v for v in node.all_input_nodes if v in inlined]
    if (
        len(node.all_input_nodes) > 1
    ):  # in a tuple of results only what is short is written in place
        return all(_is_brief(v, inlined) for v in values)
    return all(_is_short(v, _inner(v, inlined), inlined, access, site) for v in values)


def _is_brief(node: fx.Node, inlined: set[fx.Node]) -> bool:
    return node.op == "get_attr" or len(_inner(node, inlined)) < 2


def _inner(node: fx.Node, inlined: set[fx.Node]) -> list[fx.Node]:
    """The operations written inside a node's statement; attributes cost nothing."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        if source in inlined and source.op != "get_attr" and source.target is not getattr:
            found += [source, *_inner(source, inlined)]
    return found


def _last_uses(graph: fx.Graph, made: Layout) -> dict[fx.Node, int]:
    """Variable → the index of the last statement that reads it (the return's is the highest)."""
    last: dict[fx.Node, int] = {}
    for i, statement in enumerate(made.statements):
        if statement.loop is not None:
            for node in [statement.loop.start, *statement.loop.fixed]:
                last[node] = i
        else:
            for node in made.sources(statement.node):
                last[node] = i
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    for node in made.sources(output):
        last[node] = len(made.statements)
    return last


def written(
    node: fx.Node,
    inlined: set[fx.Node] | frozenset[fx.Node],
    name: Operand,
    access: Mapping[str, ast.expr],
    site: str,
) -> ast.expr:
    """A node's expression; `name` gives the variables, `access` how a module or parameter is reached."""

    def operand(source: fx.Node) -> ast.expr:
        if source in inlined:
            return written(source, inlined, name, access, site)
        return name(source)

    if node.op == "get_attr":
        return access[str(node.target)]
    if node.op == "call_module":
        arguments = [literal(a, operand) for a in node.args]
        keywords = [ast.keyword(k, literal(v, operand)) for k, v in node.kwargs.items()]
        return ast.Call(access[str(node.target)], arguments, keywords)
    return expression(node, operand, site)
