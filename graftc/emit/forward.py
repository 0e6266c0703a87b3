"""The `forward` of one graph: its parameters, its lines, and what it calls its children's inputs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from graftc.emit.literals import literal
from graftc.emit.loops import Loop, Run, find_loops
from graftc.emit.names import (
    PURPOSES,
    RESERVED,
    Style,
    is_float,
    is_stream,
    layout_base,
    operation,
    suggestions,
)
from graftc.emit.statements import Layout, Statement, layout, written


@dataclass(frozen=True)
class Hints:
    """How the caller calls a module's inputs, and its outputs by index (0 for one tensor)."""

    inputs: tuple[str, ...] = ()
    outputs: Mapping[int, str] | None = None


@dataclass(frozen=True)
class Forward:
    parameters: tuple[str, ...]
    lines: tuple[str, ...]
    children: Mapping[str, Hints]


@dataclass(frozen=True)
class Access:
    """How a graph's modules and parameters are reached from `self`, and its module lists' members."""

    paths: Mapping[str, ast.expr]
    members: Callable[[str], tuple[int, ...]]
    keyed: Callable[[str], bool]
    element: Callable[[str], str]


def forward(
    graph: fx.Graph,
    access: Access,
    style: Style,
    hints: Hints,
    site: str,
    result: Callable[[list[ast.expr]], ast.expr] | None = None,
) -> Forward:
    """The forward of `graph`. `result` wraps the root's outputs; else they are returned as they are."""
    return _Writer(graph, access, style, hints, site).write(result)


class _Writer:
    """State of one walk over a graph: which variable has which name at which statement."""

    def __init__(
        self, graph: fx.Graph, access: Access, style: Style, hints: Hints, site: str
    ) -> None:
        self.graph, self.access, self.style, self.hints, self.site = (
            graph,
            access,
            style,
            hints,
            site,
        )
        self.loops = find_loops(graph)
        self.layout: Layout = layout(graph, self.loops, access.paths, site)
        self.names: dict[fx.Node, str] = {}
        self.children: dict[str, Hints] = {}

    def write(self, result: Callable[[list[ast.expr]], ast.expr] | None) -> Forward:
        parameters = self._parameters()
        lines: list[str] = []
        for i, statement in enumerate(self.layout.statements):
            lines += (
                self._loop(i, statement) if statement.loop else [self._assignment(i, statement)]
            )
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        returned = self._returned(output, result)
        text = ast.unparse(returned)
        bare = isinstance(returned, ast.Tuple) and len(returned.elts) > 1
        lines.append(f"return {text[1:-1] if bare else text}")
        self._collect_hints()
        return Forward(tuple(parameters), tuple(lines), self.children)

    def _parameters(self) -> list[str]:
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        for i, node in enumerate(nodes):
            hint = self.hints.inputs[i] if i < len(self.hints.inputs) else str(node.target)
            keep = not self.hints.inputs or hint in self.style.inputs
            if not keep and len(nodes) == 1:
                hint = self.style.stream if is_stream(node) else "x"
            self.names[node] = self._free([hint], -1)
        return [self.names[n] for n in nodes]

    def _free(self, wanted: list[str], at: int, taken: Sequence[str] = ()) -> str:
        """The first wanted name that no live variable has when statement `at` assigns."""
        live = set(taken)
        live |= {
            name for node, name in self.names.items()
            if self.layout.last_use.get(node, -1) > at or (at < 0)
        }  # fmt: skip
        wanted = [f"{n}_" if n in RESERVED else n for n in wanted]
        modulates = wanted[0].startswith(("shift_", "scale_", "gate_"))
        for name in wanted[: 1 if modulates else None]:
            if name not in live:
                return name
        base = wanted[0 if modulates else -1]
        number = 2
        while f"{base}_{number}" in live:
            number += 1
        return f"{base}_{number}"

    def _text(self, node: fx.Node) -> ast.expr:
        def name(n: fx.Node) -> ast.expr:
            return ast.Name(self.names[n])

        return written(node, self.layout.inlined, name, self.access.paths, self.site)

    def _wanted(self, node: fx.Node, at: int) -> list[str]:
        """Names for a value that statement `at` assigns, the best first."""
        wanted = suggestions(node, self.style)
        purpose = [w for w in wanted[:1] if w in PURPOSES]
        returned = self._output_hint(node)
        reused = self._reused(node, at)
        return [w for w in (*purpose, returned, reused, *wanted) if w]

    def _reused(self, node: fx.Node, at: int) -> str | None:
        """`x = f(x)`: the name of what is read here for the last time, where it stays what it was."""
        last = [s for s in self._read(node) if self.layout.last_use.get(s) == at]
        names = {s: self.names[s] for s in last if s in self.names}
        base = layout_base(node)
        if base in names and base is not node:
            return names[base]
        if not is_float(node, 3):
            alone = len(last) == 1 and is_float(node, 2)
            return next((n for n in names.values() if alone and n in self.style.inputs), None)
        if any(n == self.style.stream and is_float(s, 3) for s, n in names.items()):
            return self.style.stream
        if not is_stream(node):
            return None
        carried = [n for n in names.values() if n in self.style.inputs]
        return carried[0] if len(last) == 1 and carried else None

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The variables whose values, and not only sizes, a node's expression reads."""
        found: list[fx.Node] = []
        for source in node.all_input_nodes:
            if operation(source) == "sym_size":
                continue
            found += self._read(source) if source in self.layout.inlined else [source]
        return found

    def _output_hint(self, node: fx.Node) -> str | None:
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        returned = output.args[0]
        if not self.hints.outputs or not isinstance(returned, (tuple, list)):
            return None
        at = [i for i, r in enumerate(returned) if r is node]
        return self.hints.outputs.get(at[0]) if at else None

    def _assignment(self, at: int, statement: Statement) -> str:
        value = ast.unparse(self._text(statement.node))
        if not statement.parts:
            name = self._free(self._wanted(statement.node, at), at)
            self.names[statement.node] = name
            return f"{name} = {value}"
        taken: list[str] = []
        for i in range(statement.size):
            part = statement.parts.get(i)
            if part is None:
                taken.append("_")
                continue
            name = self._free(self._wanted(part, at), at, taken)
            self.names[part] = name
            taken.append(name)
        return f"{', '.join(taken)} = {value}"

    def _loop(self, at: int, statement: Statement) -> list[str]:
        loop = statement.loop
        assert loop is not None
        carried = self.names[loop.start]
        lines: list[str] = []
        if self.layout.last_use.get(loop.start, -1) > at:  # read again after the loop
            taken = {self.names[n] for n in loop.fixed if n in self.names}
            carried = self._free([n for n in (self.style.stream, "h", "out") if n not in taken], at)
            lines.append(f"{carried} = {self.names[loop.start]}")
        items = self._loop_names(loop)
        self.names[loop.nodes[-1]] = carried
        lists = [self._members(run, loop) for run in loop.runs]
        over = lists[0] if len(lists) == 1 else f"zip({', '.join(lists)})"
        return [*lines, f"for {', '.join(items)} in {over}:", *self._turn(loop, items, carried)]

    def _turn(self, loop: Loop, items: list[str], carried: str) -> list[str]:
        """The body of a loop: calls within calls, or a line each where one is read twice."""
        known: dict[fx.Node, ast.expr] = {loop.start: ast.Name(carried)}
        lines: list[str] = []

        def operand(n: fx.Node) -> ast.expr:
            if n in known:
                return known[n]
            return self._text(n) if n in self.layout.inlined else ast.Name(self.names[n])

        for node, item in zip(loop.turn, items, strict=True):
            paths = {**self.access.paths, str(node.target): ast.Name(item)}
            call = written(node, self.layout.inlined, operand, paths, self.site)
            if node is loop.turn[-1]:
                return [*lines, f"    {carried} = {ast.unparse(call)}"]
            readers = [n for n in loop.turn if node in n.all_input_nodes]
            if len(readers) == 1 and list(readers[0].args).count(node) == 1:
                known[node] = call
            else:
                name = f"{item}_output"
                known[node] = ast.Name(name)
                lines.append(f"    {name} = {ast.unparse(call)}")
        raise AssertionError("a turn has at least one call")

    def _loop_names(self, loop: Loop) -> list[str]:
        used = set(self.names.values())
        if len(loop.runs) == 1:
            items = [self.access.element(loop.runs[0].container)]
        else:
            first = ["first", "second", "third", "fourth"]
            same = [r.container for r in loop.runs]
            items = [
                first[i] if same.count(r.container) > 1 else self.access.element(r.container)
                for i, r in enumerate(loop.runs)
            ]
        return [f"{n}_module" if n in used else n for n in items]

    def _members(self, run: Run, loop: Loop) -> str:
        """The module list, sliced to what the loop calls."""
        text = ast.unparse(self.access.paths[run.container])
        members, indices = self.access.members(run.container), run.indices
        keyed = self.access.keyed(run.container)
        whole = tuple(range(len(members))) == members
        if indices == members:
            return f"{text}.values()" if keyed else text
        step = indices[1] - indices[0]
        if keyed or not whole or any(b - a != step for a, b in pairwise(indices)):
            at = "str(i)" if keyed else "i"
            return f"[{text}[{at}] for i in {_indices(indices)}]"
        last = max(r.indices[-1] for r in loop.runs if r.container == run.container)
        stop = last + 1 if indices[-1] <= last < indices[-1] + step else indices[-1] + 1
        begin = str(indices[0]) if indices[0] or step > 1 else ""
        end = "" if stop > members[-1] else str(stop)
        return f"{text}[{begin}:{end}{f':{step}' if step > 1 else ''}]"

    def _returned(
        self, output: fx.Node, result: Callable[[list[ast.expr]], ast.expr] | None
    ) -> ast.expr:
        def operand(node: fx.Node) -> ast.expr:
            return self._text(node) if node in self.layout.inlined else ast.Name(self.names[node])

        value = output.args[0]
        if result is None:
            return literal(value, operand)
        values = value if isinstance(value, (tuple, list)) else (value,)
        return result([literal(v, operand) for v in values])

    def _collect_hints(self) -> None:
        """For each child, the names that its first call here uses."""
        for node in self.graph.nodes:
            if node.op != "call_module" or str(node.target) in self.children:
                continue
            arguments = [a for a in node.args if isinstance(a, fx.Node)]
            inputs = [self._hint(a) for a in arguments]
            outputs = {u.args[1]: self._hint(u) for u in node.users if u.target is operator.getitem}
            self.children[str(node.target)] = Hints(
                tuple(inputs), {int(str(k)): v for k, v in outputs.items() if isinstance(k, int)}
            )

    def _hint(self, node: fx.Node) -> str:
        return self.names.get(node) or suggestions(node, self.style)[0]


def _indices(indices: tuple[int, ...]) -> str:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if len(indices) > 2 and all(b - a == step for a, b in pairwise(indices)):
        return f"range({indices[0]}, {indices[-1] + 1}{f', {step}' if step > 1 else ''})"
    return f"({', '.join(map(str, indices))}{',' if len(indices) == 1 else ''})"
