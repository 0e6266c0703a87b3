"""Whether a dataflow rule can match what it says: its own left side, as a graph, normalised as models are.

What capture writes otherwise (an op that it takes out, an einsum that becomes a product, numbers that are one
number before the model runs) is in no model, so a pattern of it never matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graftc.diagnostics import Diagnostic, Note, Span
from graftc.language.rules import DataflowMatch, Fact, KindGuard, Literal_, Operation, Rule
from graftc.program.flat import Op
from graftc.program.normalise import normalise
from graftc.rewrite.dataflow.example import SPAN, Example, example_of
from graftc.rewrite.dataflow.matcher import occurrences
from graftc.rewrite.dataflow.occurrence import SiteValue
from graftc.rewrite.dataflow.pattern import Node, Pattern
from graftc.rewrite.dataflow.select import rule_patterns
from graftc.rewrite.dataflow.view import graph_ops, program_view

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class _Missed:
    """A way of a pattern that does not match itself. `why`: where, and what normalisation makes of it."""

    pattern: Pattern
    why: Diagnostic


def own_side(rule: Rule) -> Iterator[Diagnostic]:
    """What is wrong with a dataflow rule's left side, whatever the model: nothing, where it matches itself.

    G443, an error: no way to take its choices matches. G444, a warning: a choice that never does. G445, a note: no
    tensors were found on which its ops run, so that it was not tried.

    >>> from graftc.language.check import check
    >>> (rule,) = check("rule r { match { y = relu(x * 1) }\\nrewrite { y = relu(x) }\\n}").rules
    >>> [(d.code, d.span.text, d.found) for d in own_side(rule)]
    [('G443', 'x * 1', '`relu(x)`')]
    """
    if not any(isinstance(m, DataflowMatch) for m in rule.matches):
        return
    missed: list[_Missed] = []
    alive: set[tuple[Span, str]] = set()
    untried: list[Diagnostic] = []
    for pattern in _ways(rule_patterns(rule)):
        told = _missed(rule, pattern)
        if told is None:
            alive |= {(n.op_span, n.ops[0]) for n in pattern.nodes}
        elif told.code == "G445":
            untried.append(told)
        else:
            missed.append(_Missed(pattern, told))
    if untried and not alive:
        yield _never_held(rule) or _untried(rule, untried[0])
    elif missed and not alive:
        yield missed[0].why
    for way in missed:
        dead = next((n for n in way.pattern.nodes if (n.op_span, n.ops[0]) not in alive), None)
        if alive and dead is not None:
            yield _dead_choice(rule, dead, way.why)
            return


def _ways(patterns: tuple[Pattern, ...]) -> Iterator[Pattern]:
    """Each pattern with one name for each op: the first ones, then each other name once."""
    for pattern in patterns:
        first = tuple(replace(n, ops=n.ops[:1]) for n in pattern.nodes)
        yield replace(pattern, nodes=first)
        for node in pattern.nodes:
            for op in node.ops[1:]:
                nodes = list(first)
                nodes[node.index] = replace(node, ops=(op,))
                yield replace(pattern, nodes=tuple(nodes))


def _missed(rule: Rule, pattern: Pattern) -> Diagnostic | None:
    """None where the pattern matches the graph that it says; else why not, of the first dtype."""
    first: Diagnostic | None = None
    for dtype in _dtypes(rule):
        example = example_of(pattern, rule.guards, dtype)
        if isinstance(example, Diagnostic):
            return first or replace(example, code="G445")
        told = _matches(rule, pattern, example)
        if told is None:
            return None
        first = first or told
    return first


def _dtypes(rule: Rule) -> tuple[torch.dtype, ...]:
    """The dtypes that `where dtype(x) == …` asks for, else those that models have."""
    said: list[str] = []

    def read(part: Any) -> None:
        if isinstance(part, Operation):
            names = {type(a) for a in part.args}
            if part.op == "==" and names == {Fact, Literal_}:
                fact, literal = sorted(part.args, key=lambda a: isinstance(a, Literal_))
                if isinstance(fact, Fact) and fact.name == "dtype" and isinstance(literal, Literal_):  # fmt: skip
                    said.append(str(literal.value))
            for argument in part.args:
                read(argument)

    read(rule.where)
    found = [d for n in said if isinstance(d := getattr(torch, n, None), torch.dtype)]
    return (*found, *(d for d in _DTYPES if d not in found))


def _matches(rule: Rule, pattern: Pattern, example: Example) -> Diagnostic | None:
    graph = example.root.graph
    spans: dict[fx.Node, Span] = {n: n.meta[SPAN] for n in graph.nodes if SPAN in n.meta}
    written = _text(graph)
    normalise(example.root)
    flat = graph_ops(graph)
    view = program_view(flat)
    by_node = {o.node: o for o in flat.ops}
    sites: Mapping[str, Mapping[Op, SiteValue]] = {
        name: {by_node[n]: SiteValue(by_node[n].args, None)}
        for name, n in example.sites.items()
        if n in by_node
    }
    if next(occurrences(pattern, view, sites), None) is not None:
        return None
    left = _text(graph)
    gone = [spans[n] for n in spans if n not in set(graph.nodes)]
    made = set(spans.values())
    folded = [n.span for n in pattern.nodes if not n.site and n.span not in made]
    place = (gone or folded or [pattern.span])[0]
    help = "write the pattern as it is found, or leave that op out"
    if gone:
        why = f"capture writes `{place.text}` otherwise, in every model"
    elif folded:
        why = f"`{place.text}` is one number before the model runs, and no op of it"
        help = "write a name for the number: `where NAME is number`"
    else:
        why = "an op of it is written otherwise in every model"
    return Diagnostic(
        "G443",
        f"rule `{rule.name}` can never match what it says: {why}",
        span=place,
        wanted=f"`{written}`" if written != left else "a pattern that matches its own ops",
        found=f"`{left}`",
        notes=(Note(f"rule `{rule.name}` is here", rule.span),),
        help=help,
    )


def _never_held(rule: Rule) -> Diagnostic | None:
    """The kind that `where` asks for and no op takes: a pattern that runs without it, and not with it."""
    for guard in rule.guards:
        others = tuple(g for g in rule.guards if g is not guard)
        if not isinstance(guard, KindGuard):
            continue
        if any(isinstance(example_of(p, others, torch.float32), Example) for p in _ways(rule_patterns(rule))):  # fmt: skip
            return Diagnostic(
                "G443",
                f"rule `{rule.name}` can never match what it says: the ops of its pattern do not take what `where` asks for",
                span=guard.span,
                found=guard.span.text,
                notes=(Note(f"rule `{rule.name}` is here", rule.span),),
                help="leave this guard out",
            )
    return None


def _dead_choice(rule: Rule, node: Node, why: Diagnostic) -> Diagnostic:
    return Diagnostic(
        "G444",
        f"a choice of rule `{rule.name}` never matches",
        span=node.op_span if why.span is None else why.span,
        wanted=why.wanted,
        found=why.found,
        help="leave this choice out",
        severity="warning",
    )


def _untried(rule: Rule, why: Diagnostic) -> Diagnostic:
    return Diagnostic(
        "G445",
        f"the pattern of rule `{rule.name}` was not tried on itself: no tensors were found that its ops take",
        span=why.span,
        found=why.message,
        severity="note",
    )


def _text(graph: fx.Graph) -> str:
    """A graph as the language writes it: its outputs, each the ops that make it."""
    view = program_view(graph_ops(graph))

    def shown(value: Any) -> str:
        if isinstance(value, Op):
            if value.kind != "op":
                return str(value.target)
            name = view.op(value)
            name = value.node.meta[SPAN].text if name.startswith("<") else name  # a bound site
            return f"{name}({', '.join(shown(a) for a in value.args)})"
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(shown(v) for v in value) + "]"  # pyright: ignore[reportUnknownVariableType]
        if value is None or isinstance(value, bool):
            return str(value).lower()
        return f"{value:.6g}" if isinstance(value, float) else str(value).removeprefix("torch.")

    text = ", ".join(shown(o) for o in view.flat.outputs)
    return text if len(text) <= 200 else text[:199] + "…"
