"""Dropout, beside the graph: what train mode drops, while every pass sees what eval mode computes.

`note` takes the dropouts out of a graph that was traced in train mode, and writes each down at the value that it
drops (in `node.meta`). An edit that rewires a call leaves the note on what the call gives; what an edit takes out goes
with its notes. `graftc.emit.dropout` makes modules of the notes, for the printed package.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graftc.program.ops import SDPA
from graftc.program.program import ATEN, Program, graphs, value
from graftc.program.traces import own_lines

NOTED = "graft_dropout"
"""Node meta: the dropouts of train mode at the value that the node gives, in order, as a tuple of `Drop`."""

_NAME = "graft_dropout_name"
"""Node meta of a dropout: the name of its module in the graph that calls it."""

ATTENTION, LAYOUT = "attention", "layout"
_OF_THE_OP = (ATTENTION, LAYOUT)
RATE = 4
"""Where the rate stands among the arguments of scaled_dot_product_attention."""


@dataclass(frozen=True)
class Drop:
    """One dropout: its kind, its rate, the name of its module where the original has one, and the user's line.

    `kind` is the ATen operator's name; `attention` is the one inside scaled_dot_product_attention, and `layout` is none:
    a copy in rows that train mode's kernels need and eval mode's do not.
    """

    kind: str
    p: float
    name: str
    line: str = ""


_KINDS: Mapping[Any, str] = {
    ATEN.dropout.default: "dropout",
    ATEN.native_dropout.default: "dropout",
    ATEN.feature_dropout.default: "feature_dropout",
    ATEN.alpha_dropout.default: "alpha_dropout",
    ATEN.feature_alpha_dropout.default: "feature_alpha_dropout",
}
Lines = Counter[str]
"""How many dropouts there are at a line of the user's."""

SIZES: frozenset[Any] = frozenset({ATEN.sym_size.int, ATEN.sym_stride.int, getattr})
"""What reads a value's size and not what is in it."""


def note(root: fx.GraphModule) -> Lines:
    """Take the dropouts out of a freshly captured tree (in place), and note each at the value that it drops.

    Where that value is read undropped as well, the op stays: no note on a value could say so. The lines of all of them.
    """
    tree = list(graphs(root))
    opened = {id(inner) for _, module in reversed(tree) for inner in _open_modules(module)}
    left: Lines = Counter()
    for module in (m for _, m in tree if id(m) not in opened):
        for node in list(module.graph.nodes):
            if node.target in _KINDS and not _note_op(node):
                left[line_of(node)] += 1
            elif node.target is SDPA:
                _note_attention(node)
            elif _is_unused_draw(node):
                module.graph.erase_node(node)
    return left + lines(root)


def lines(root: fx.GraphModule) -> Lines:
    """The user's line of each dropout that is noted."""
    nodes = (n for _, m in graphs(root) for n in m.graph.nodes)
    return Counter(d.line for n in nodes for d in drops(n))


def line_of(node: fx.Node) -> str:
    return next(iter(own_lines(node.meta.get("stack_trace"))), "")


def noted(program: Program) -> list[tuple[str, fx.Node, Drop]]:
    """The dropouts that are noted: path of the graph, node, dropout."""
    return [
        (path, node, drop)
        for path, module in program.graphs()
        for node in module.graph.nodes
        for drop in drops(node)
        if drop.kind != LAYOUT
    ]


def drops(node: fx.Node) -> tuple[Drop, ...]:
    """The dropouts of train mode at a node's value."""
    return node.meta.get(NOTED, ())


def hand_over(old: fx.Node, new: fx.Node) -> None:
    """Note at the value `new`, which takes the place of `old`, what is dropped of `old`."""
    given = tuple(d for d in drops(old) if d.kind not in _OF_THE_OP)
    if given:
        new.meta[NOTED] = (*drops(new), *given)


def left_behind(node: fx.Node) -> tuple[Drop, ...]:
    """What `hand_over` does not hand over: it belongs to the op."""
    return tuple(d for d in drops(node) if d.kind in _OF_THE_OP)


def hand_out(module: nn.Module, call: fx.Node) -> None:
    """Note at a call what the module that it called dropped of its result: another one now stands there."""
    while isinstance(module, fx.GraphModule):
        (*_, end) = module.graph.nodes
        returned = end.args[0]
        if not isinstance(returned, fx.Node):
            return
        hand_over(returned, call)
        if returned.op != "call_module":
            return
        module = module.get_submodule(str(returned.target))


def told(program: Program) -> str:
    """`dropout p = 0.1 at 24 places`; '' where there is none.

    >>> from graftc.program.modes import captured
    >>> from graftc.program.model import Model
    >>> layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    >>> told(captured(Model(layers.eval(), {"input": torch.zeros(2, 4)})))
    'dropout p = 0.1 at 1 place'
    """
    rates = Counter(drop.p for _, _, drop in noted(program))
    said = [f"p = {p:g} at {n} place{'s' if n > 1 else ''}" for p, n in sorted(rates.items())]
    return f"dropout {', '.join(said)}" if said else ""


def take_notes(program: Program, trained: Program) -> list[str]:
    """Copy the notes of `trained` to `program` (in place), graph by graph; the paths of graphs that differ.

    `trained` is the same model traced in train mode, its dropouts noted; graphs agree node by node or not at all.
    Only copies that lay values out anew may be in one and not in the other: kernels differ with the mode.
    """
    others = dict(trained.graphs())
    differ: list[str] = []
    for path, module in program.graphs():
        other = others.pop(path, None)
        if other is None or _form(module.graph) != _form(other.graph):
            differ.append(path)
            continue
        twins = dict(zip(_computing(other.graph), _computing(module.graph), strict=True))
        for node, twin in twins.items():
            found = drops(node)
            if any(_lays_out(u) for u in node.users) and not any(_lays_out(u) for u in twin.users):
                found = (*found, Drop(LAYOUT, 0.0, ""))  # kept as well: a view after it needs it
            if found:
                twin.meta[NOTED] = found
    return [*differ, *others]


def _lays_out(node: fx.Node) -> bool:
    return node.target in (ATEN.contiguous.default, ATEN.clone.default)


def _passes(node: fx.Node) -> bool:
    """What is in a graph of one mode alone and changes nothing else: a copy, a dropout that no note could say."""
    return _lays_out(node) or node.target in _KINDS


def _computing(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if not _passes(n)]


def _form(graph: fx.Graph) -> list[Any]:
    """A graph as data: two are equal where their nodes do the same, whatever they are called."""
    number = {node: i for i, node in enumerate(_computing(graph))}

    def name(node: fx.Node) -> str:
        while _passes(node):
            node = node.args[0]  # type: ignore[assignment]
        return f"%{number[node]}"

    return [
        (n.op, "" if n.op in ("placeholder", "output") else str(n.target),
         str(fx.map_arg(_arguments(n), name)), str(fx.map_arg(dict(n.kwargs), name)))
        for n in number
    ]  # fmt: skip


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments; a view's with the sizes that they come to, an attention's without what is at its default."""
    made = value(node)
    if node.target is ATEN.view.default and isinstance(made, torch.Tensor):
        source, sizes = node.args
        known = [d if isinstance(d, int) else -1 for d in made.shape]
        pairs = zip(sizes, known, strict=True)  # type: ignore[arg-type]
        return source, [s if isinstance(s, fx.Node) else k for s, k in pairs]
    if node.target is not SDPA:
        return node.args
    wanted = [a.default_value for a in SDPA._schema.arguments[: len(node.args)]]
    args = list(node.args)
    while len(args) > 3 and not isinstance(args[-1], fx.Node) and args[-1] == wanted[len(args) - 1]:
        args.pop()
    return tuple(args)


def _note_op(node: fx.Node) -> bool:
    """Note an op and take it out, or leave it; False for one that drops and had to stay."""
    source, p, on = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node)
    if p == 0 or on is not True:
        return True  # taken out with what else does nothing
    if not node.users or any(u is not node and u.target not in SIZES for u in source.users):
        return False
    name = node.meta.get(_NAME, "dropout")
    drop = Drop(_KINDS[node.target], float(p), name, line_of(node))  # type: ignore[arg-type]
    source.meta[NOTED] = (*drops(source), drop)
    if node.target is ATEN.native_dropout.default:  # the values and what was dropped
        for part in list(node.users):
            part.replace_all_uses_with(source)
            node.graph.erase_node(part)
    else:
        node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def _note_attention(node: fx.Node) -> None:
    args, kwargs = list(node.args), dict(node.kwargs)
    p = args[RATE] if len(args) > RATE else kwargs.pop("dropout_p", 0.0)
    if len(args) > RATE:
        args[RATE] = 0.0
    if isinstance(p, (int, float)) and p > 0:
        node.meta[NOTED] = (*drops(node), _attention(node, float(p)))
        node.args, node.kwargs = tuple(args), kwargs


def _attention(node: fx.Node, p: float) -> Drop:
    return Drop(ATTENTION, p, "attention_dropout", line_of(node))


def _is_unused_draw(node: fx.Node) -> bool:
    """A number that was drawn for a choice that was never open (layers dropped with probability 0)."""
    return node.target in (ATEN.rand.default, ATEN.rand.generator) and not node.users


def _open_modules(owner: fx.GraphModule) -> list[nn.Module]:
    """Put the dropouts of called modules that do nothing else (`nn.Dropout`) in place of the calls; these modules."""
    found: list[nn.Module] = []
    for call in [n for n in owner.graph.nodes if n.op == "call_module"]:
        inner = owner.get_submodule(str(call.target))
        if not isinstance(inner, fx.GraphModule):
            continue
        (*_, end) = inner.graph.nodes
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        others = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
        if not any(n.target in _KINDS for n in others) or not all(
            n.target in _KINDS or n.target is operator.getitem for n in others
        ):
            continue
        if not isinstance(end.args[0], fx.Node):
            continue
        copies: dict[fx.Node, Any] = dict(zip(inputs, call.args, strict=True))
        with owner.graph.inserting_before(call):
            for node in others:
                copies[node] = owner.graph.node_copy(node, copies.__getitem__)
                copies[node].meta[_NAME] = str(call.target)
        call.replace_all_uses_with(copies[end.args[0]])
        owner.graph.erase_node(call)
        found.append(inner)
    return found
