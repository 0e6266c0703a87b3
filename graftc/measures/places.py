"""Where a Program is observed: the values that an attention op reads, a block's stream, a site's output."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from graftc.measures.observers import (
    InfluenceObserver,
    LocalityObserver,
    Observer,
    StatisticsObserver,
)
from graftc.program.analysis import ATTENTION_ROLES, Analysis, Site
from graftc.program.chains import Chain
from graftc.program.flat import Op
from graftc.program.ops import SDPA
from graftc.program.program import size_hint, value
from graftc.program.refusals import op_name
from graftc.program.roles import Attention

STATISTICS_ROLES = (*ATTENTION_ROLES, "mlp", "block")
Value = tuple[str, int | None]
"""A node of a graph by its name, and which item of what it gives (None: all of it)."""


@dataclass(frozen=True, eq=False)
class Place:
    """An observer, called in the graph of module `graph` after node `after` on `values`."""

    graph: str
    after: str
    values: tuple[Value, ...]
    observer: Observer


@dataclass(frozen=True, eq=False)
class Places:
    """All places of a family, and why a site has none (path → a sentence)."""

    found: tuple[Place, ...] = ()
    why: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.observer.site for p in self.found))


def places(analysis: Analysis, family: str) -> Places:
    """Where a family of measures (`program.measured.FAMILY`) is observed."""
    return {"locality": _locality, "influence": _influence, "statistics": _statistics}[family](
        analysis
    )


def _locality(analysis: Analysis) -> Places:
    found: list[Place] = []
    why = {s.path: _no_attention(s, analysis) for s in analysis.sites}
    for path, attention in analysis.attentions.items():
        reason = _not_local(attention)
        if reason is not None:
            why[path] = reason
            continue
        found.append(_attention_place(path, attention))
        del why[path]
    return Places(tuple(found), why)


def _no_attention(site: Site, analysis: Analysis) -> str:
    refused = next((r for r in analysis.refused if r.path == site.path and r.role == "attention"), None)  # fmt: skip
    if refused is not None:
        return f"it holds no attention op that can be read apart: {refused.reason}"
    return f"it is {site.role}, and holds no attention op that graftc knows"


def _not_local(a: Attention) -> str | None:
    """Why the attention has no share of mass within a band; None where it has."""
    if a.form == "linear":
        return "it is a linear attention: it has no softmax rows"
    if a.form == "opaque":
        return f"its attention is {op_name(a.anchor)}, which graftc cannot see into"
    if a.anchor.target is SDPA:
        shapes = [[size_hint(s) for s in t.tensor.shape] for t in (a.query, a.key)]
        n, m = shapes[0][-2], shapes[1][-2]
    else:
        shape = [size_hint(s) for s in a.anchor.tensor.shape]
        dim = a.anchor.args[1]
        if len(shape) < 2 or dim not in (-1, len(shape) - 1):
            return "its softmax is not over the last dimension"
        n, m = shape[-2:]
    if a.kind == "cross_attention" or n != m:
        return f"its {n} queries and {m} keys are not of one sequence, so there is no |i − j|"
    return None


def _attention_place(path: str, a: Attention) -> Place:
    op = a.anchor
    if op.target is not SDPA:
        observer = LocalityObserver(path, written_out=True, causal=False, scale=None)
        return Place(op.path, op.node.name, ((op.node.name, None),), observer)
    mask = op.argument(3, "attn_mask")
    given = [op.args[0], op.args[1], *([mask] if isinstance(mask, Op) else [])]
    names = [n.name for n in _argument_nodes(op.node, len(given))]
    observer = LocalityObserver(
        path,
        written_out=False,
        causal=bool(op.argument(5, "is_causal", False)),
        scale=op.argument(6, "scale"),
    )
    return Place(op.path, op.node.name, tuple((n, None) for n in names), observer)


def _argument_nodes(call: fx.Node, count: int) -> list[fx.Node]:
    """The nodes of q, k and, where `count` is 3, the mask of a `scaled_dot_product_attention`."""
    given = [call.args[0], call.args[1]]
    if count > 2:
        given.append(call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask"))
    nodes = [n for n in given if isinstance(n, fx.Node)]
    assert len(nodes) == count
    return nodes


def _influence(analysis: Analysis) -> Places:
    found: list[Place] = []
    why = {s.path: f"it is {s.role}, not a block of a chain" for s in analysis.sites}
    for chain in analysis.chains:
        usual = _stream_item(analysis, chain)
        for path, position in zip(chain.paths, chain.streams, strict=True):
            observer = InfluenceObserver(path)
            calls = list(_calls(analysis, path))
            ends = [_stream(call, position, usual) for _, call in calls]
            if not calls or None in ends:
                why[path] = "it gives no stream of the shape that it is given"
                continue
            found += [
                Place(graph, call.name, end, observer)
                for (graph, call), end in zip(calls, ends, strict=True)
                if end is not None
            ]
            del why[path]
    return Places(tuple(found), why)


def _stream(call: fx.Node, position: int, usual: int | None) -> tuple[Value, Value] | None:
    """The stream that a block is given and the one that it gives; None where no result has the shape.

    `usual`: which item of the result it is in the chain's other blocks.
    """
    before = call.args[position] if len(call.args) > position else None
    if not isinstance(before, fx.Node):
        return None
    made = value(call)
    if not isinstance(made, (tuple, list)):
        return ((before.name, None), (call.name, None)) if _alike(value(before), made) else None
    alike = [i for i, item in enumerate(made) if _alike(value(before), item)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if not alike:
        return None
    return (before.name, None), (call.name, usual if usual in alike else alike[0])


def _alike(one: object, other: object) -> bool:
    """Whether both are tensors of one shape, at the example's sizes."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return [size_hint(s) for s in one.shape] == [size_hint(s) for s in other.shape]


def _stream_item(analysis: Analysis, chain: Chain) -> int | None:
    """Which item of what a block gives is the stream that the next block reads; None where it gives a tensor."""
    streams = {
        id(analysis.program.module(p)): i for p, i in zip(chain.paths, chain.streams, strict=True)
    }
    for path in chain.paths:
        for graph, call in _calls(analysis, path):
            owner = analysis.program.module(graph)
            for user in call.users:
                if user.target is operator.getitem:
                    calls = [u for u in user.users if u.op == "call_module"]
                    blocks = [
                        (u, streams.get(id(owner.get_submodule(str(u.target))))) for u in calls
                    ]
                    if any(i is not None and _reads(u, user, i) for u, i in blocks):
                        index = user.args[1]
                        return index if isinstance(index, int) else None
    return None


def _reads(call: fx.Node, given: fx.Node, position: int) -> bool:
    return len(call.args) > position and call.args[position] is given


def _statistics(analysis: Analysis) -> Places:
    found: list[Place] = []
    why: dict[str, str] = {}
    for site in analysis.sites:
        if site.role not in STATISTICS_ROLES:
            why[site.path] = f"it is {site.role}: statistics are of attentions, mlps and blocks"
            continue
        observer = StatisticsObserver(site.path)
        for graph, call in _calls(analysis, site.path):
            found.append(Place(graph, call.name, _outputs(call), observer))
    return Places(tuple(found), why)


def _outputs(call: fx.Node) -> tuple[Value, ...]:
    """What a call gives: the tensor, or the items of it that are used."""
    if not isinstance(value(call), (tuple, list)):
        return ((call.name, None),)
    items = [u.args[1] for u in call.users if u.target is operator.getitem]
    return tuple((call.name, i) for i in sorted({i for i in items if isinstance(i, int)}))


def _calls(analysis: Analysis, path: str) -> Iterator[tuple[str, fx.Node]]:
    """Every call of the module at `path`, under whatever name, a graph that runs several times once."""
    program = analysis.program
    module = program.module(path)
    seen: set[fx.Node] = set()
    for call in analysis.flat.calls:
        if call.node not in seen and program.module(call.path) is module:
            seen.add(call.node)
            yield call.graph, call.node


def observed(root: fx.GraphModule, wanted: tuple[Place, ...]) -> nn.Module:
    """A module with `root`'s parameters that takes its inputs, calls the observers, and returns nothing.

    `root` stays as it is; what no observer needs is left out where the root's graph says so.
    """
    from graftc.rewrite.tree import with_own_paths

    made = with_own_paths(root, {p.graph for p in wanted})
    changed: dict[int, fx.GraphModule] = {}
    for number, place in enumerate(wanted):
        owner = made.get_submodule(place.graph)
        assert isinstance(owner, fx.GraphModule)
        changed[id(owner)] = owner
        _insert(owner, place, f"_graftc_observer_{number}")
    _forget_result(made)
    changed[id(made)] = made
    for owner in changed.values():
        owner.graph.lint()
        owner.recompile()
    return made


def _insert(owner: fx.GraphModule, place: Place, name: str) -> None:
    owner.add_module(name, place.observer)
    nodes = {n.name: n for n in owner.graph.nodes}
    last = nodes[place.after]
    given: list[fx.Node] = []
    for node, item in place.values:
        source = nodes[node]
        if item is not None:
            with owner.graph.inserting_after(last):
                last = source = owner.graph.call_function(operator.getitem, (source, item))
        given.append(source)
    with owner.graph.inserting_after(last):
        owner.graph.call_module(name, tuple(given))


def _forget_result(root: fx.GraphModule) -> None:
    """The root returns nothing, and calls nothing that leads to no observer."""
    end = next(n for n in reversed(root.graph.nodes) if n.op == "output")
    end.args = (None,)
    for node in reversed(list(root.graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module":
            called = root.get_submodule(str(node.target))
            if any(isinstance(m, Observer) for m in called.modules()):
                continue
        root.graph.erase_node(node)
