"""A match as a region of the Program: which graph it is rewritten in, and which modules open for that.

The new ops go into the innermost graph that sees all of the region: the deepest module that holds every matched
op. Modules between it and a matched op are opened there, so that names of parameters stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftc.diagnostics import Note, fail
from graftc.language.rules import Rewrite, Rule
from graftc.program.analysis import Analysis
from graftc.program.flat import Call, Op
from graftc.rewrite.dataflow.occurrence import Occurrence
from graftc.rewrite.dataflow.pattern import NodeRef
from graftc.rewrite.dataflow.select import claimed_nodes

Step = int | str


@dataclass(frozen=True)
class Place:
    """A node of the original Program: the path of its graph, and its name there."""

    graph: str
    node: str


@dataclass(frozen=True)
class Argument:
    """Where a value from outside is read: the way through the arguments of a matched node."""

    reader: Place
    keyword: bool
    way: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """A match of a dataflow rule, by places that survive copying.

    `host`: the path of the graph that gets the new ops. `opened`: modules that are opened into it, outer ones
    first. `results`: the pattern's names that ops make. `outside`: what the other names stand for, with an
    `Argument` for each value. `parameters`: names that are parameters, by FQN. `sites`: the calls of bound sites,
    and which argument is the token stream. `gone`: nodes that are taken away.
    """

    occurrence: Occurrence
    host: str
    opened: tuple[str, ...]
    results: Mapping[str, Place]
    outside: Mapping[str, Any]
    parameters: Mapping[str, str]
    sites: Mapping[str, tuple[Place, int]]
    gone: tuple[Place, ...]

    @property
    def name(self) -> str:
        """A name for people and for plans: `blocks.0.attn:matmul_1`."""
        return f"{self.host}:{self.gone[-1].node}" if self.gone else self.host


def region_of(rule: Rule, occurrence: Occurrence, analysis: Analysis) -> Region:
    """The region of a match. Raises GraftError where it cannot be rewritten there."""
    assert isinstance(rule.edit, Rewrite)
    ops: tuple[Op, ...] = occurrence.values
    pattern = occurrence.pattern
    calls = {
        n.index: analysis.flat.first_calls[occurrence.sites[n.site].path]
        for n in pattern.nodes
        if n.site
    }
    graphs = {i: calls[i].graph if i in calls else _graph(op) for i, op in enumerate(ops)}
    host = _host(list(graphs.values()), analysis)
    opened = _opened(list(graphs.values()), host, analysis)
    nodes = {i: calls[i].node if i in calls else op.node for i, op in enumerate(ops)}
    places = {i: Place(graphs[i], node.name) for i, node in nodes.items()}
    _check_called_once(rule, host, opened, analysis)
    _check_blocks(rule, opened, analysis)
    results = {
        name: places[result.index]
        for name, result in pattern.results.items()
        if isinstance(result, NodeRef)
    }
    locate = _Locator(occurrence, places, calls)
    outside = {n: s for n, s in occurrence.sizes.items() if isinstance(s, int)}
    outside |= {name: locate(value) for name, value in occurrence.names.items()}
    parameters = {
        name: value.fqn
        for name, value in occurrence.names.items()
        if isinstance(value, Op) and value.kind == "param"
    }
    gone = tuple(places[i] for i in sorted(claimed_nodes(pattern), key=lambda i: ops[i].index))
    sites = {
        n.site: (places[n.index], occurrence.sites[n.site].stream) for n in pattern.nodes if n.site
    }
    return Region(occurrence, host, opened, results, outside, parameters, sites, gone)


def _graph(op: Op) -> str:
    """The path of the graph that an op stands in."""
    return op.path.rpartition(".")[0] if op.kind == "module" else op.path


def _host(graphs: list[str], analysis: Analysis) -> str:
    """The deepest graph at or above all of these."""
    common: list[str] = []
    for level in zip(*(g.split(".") for g in graphs), strict=False):
        if len(set(level)) != 1:
            break
        common.append(level[0])
    return analysis.flat.called(".".join(common))


def _opened(graphs: list[str], host: str, analysis: Analysis) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for graph in graphs:
        path = graph
        while path != host:
            found[path] = None
            path = analysis.flat.first_calls[path].graph
    return tuple(sorted(found, key=lambda p: p.count(".")))


def _check_called_once(rule: Rule, host: str, opened: tuple[str, ...], analysis: Analysis) -> None:
    """A module that runs several times has one graph: an edit of it would edit every call."""
    for path in (host, *opened):
        while path:
            calls = analysis.call_counts[id(analysis.program.module(path))]
            if calls > 1:
                fail(
                    "G361",
                    f"{path} is shared: it is called {calls} times",
                    span=rule.edit.span,
                    site=path,
                    help="edits of modules that run several times are not supported yet",
                )
            path = path.rpartition(".")[0]


def _check_blocks(rule: Rule, opened: tuple[str, ...], analysis: Analysis) -> None:
    blocks = {p: c.name for c in analysis.chains for p in c.paths}
    crossed = [p for p in opened if p in blocks]
    if crossed:
        fail(
            "G382",
            f"rule `{rule.name}` matches across the border of block {crossed[0]}",
            span=rule.edit.span,
            site=crossed[0],
            wanted="a match inside one block, or outside all of them",
            notes=[
                Note(
                    f"`{blocks[crossed[0]]}` would lose this block: it would be opened into its caller"
                )
            ],
            help="name the values at the border in two rules, one for each side",
        )


@dataclass(frozen=True, eq=False)
class _Locator:
    """Where the values from outside are read: in an argument of a matched op, or of a matched site's call."""

    occurrence: Occurrence
    places: Mapping[int, Place]
    calls: Mapping[int, Call]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(value, Op):
            return value
        for node in self.occurrence.pattern.nodes:
            op = self.occurrence.values[node.index]
            args, kwargs = op.args, op.kwargs
            if node.site:
                args, kwargs = self.calls[node.index].args, {}
            for keyword, given in ((False, enumerate(args)), (True, kwargs.items())):
                for key, argument in given:
                    way = _way(argument, value, (key,))
                    if way is not None:
                        return Argument(self.places[node.index], keyword, way)
        raise AssertionError(f"no matched op reads {value}")


def _way(at: Any, value: Op, way: tuple[Step, ...]) -> tuple[Step, ...] | None:
    """The way through lists to a value."""
    if at is value:
        return way
    if isinstance(at, tuple):
        for i, item in enumerate(at):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            found = _way(item, value, (*way, i))
            if found is not None:
                return found
    return None


def path_in(host: str, path: str) -> str:
    """A path below a graph as the graph's own targets have it."""
    return path.removeprefix(host + ".") if host else path
