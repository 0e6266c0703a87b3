"""An einsum of two operands that is one product of matrices is written as that product.

So attention in einsum and attention in matmul are one form, for roles, for parts, for patterns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graftc.program.program import ATEN, value


def to_matmul(graph: fx.Graph) -> None:
    """Rewrite `einsum("bihd,bjhd->bhij", q, k)` as permutes around a matmul, in place.

    One index each of the left alone, the right alone and the contraction; the rest are in both and in the
    result. Other einsums stay as they are.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is ATEN.einsum.default:
            plan = _plan(node)
            if plan is not None:
                _rewrite(graph, node, *plan)


def _plan(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """Permutations of left, right (to batch…, rows, columns) and of the product (to the result)."""
    operands: Any = node.args[1]
    terms, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(parts) != 2 or not arrow or "." in terms:
        return None
    left, right = parts
    if any(len(set(t)) != len(t) for t in (left, right, out)):
        return None
    shared = [i for i in out if i in left and i in right]
    rows = [i for i in left if i not in right]
    columns = [i for i in right if i not in left]
    inner = [i for i in left if i in right and i not in out]
    if any(len(group) != 1 for group in (rows, columns, inner)):
        return None
    if set(out) != {*shared, *rows, *columns} or not _same_sizes(operands, left, right, shared):
        return None
    product = [*shared, *rows, *columns]
    return (
        [left.index(i) for i in [*shared, *rows, *inner]],
        [right.index(i) for i in [*shared, *inner, *columns]],
        [product.index(i) for i in out],
    )


def _same_sizes(operands: Any, left: str, right: str, shared: list[str]) -> bool:
    """einsum broadcasts a size of one, as matmul does, but the permutes must not hide it."""
    a, b = (value(o) for o in operands)
    return all(a.shape[left.index(i)] == b.shape[right.index(i)] for i in shared)


def _rewrite(
    graph: fx.Graph, node: fx.Node, left: list[int], right: list[int], out: list[int]
) -> None:
    operands: Any = node.args[1]
    with graph.inserting_before(node):
        a, b = _permuted(graph, operands[0], left), _permuted(graph, operands[1], right)
        product = graph.call_function(ATEN.matmul.default, (a, b))
        product.meta["val"] = torch.matmul(value(a), value(b))
        result = _permuted(graph, product, out)
    for made in (a, b, product, result):
        made.meta.setdefault("stack_trace", node.meta.get("stack_trace"))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _permuted(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    if order == sorted(order):
        return node
    made = graph.call_function(ATEN.permute.default, (node, order))
    made.meta["val"] = value(node).permute(order)
    return made
