"""Edits of a dataflow rule's text: each takes one change of a near miss away.

A change is worked out while a pattern is laid onto ops; its edit needs what the whole of it came to (what is bound to
which name, whether a value is read in one place or in all), so it is made afterwards, by a `Mender`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftc.diagnostics import Source, Span, TextEdit
from graftc.language.dataflow_ops import OPS, OpParameter, OpWord
from graftc.program.flat import Op
from graftc.rewrite.dataflow.pattern import (
    GETITEM,
    Anything,
    Fixed,
    Items,
    Node,
    NodeRef,
    Operand,
    Pattern,
    Rest,
    ValueRef,
    Without,
    refs,
)
from graftc.rewrite.dataflow.same import same, same_constant
from graftc.rewrite.dataflow.view import ProgramView
from graftc.rewrite.whynot.align import Step

Edits = tuple[TextEdit, ...]
_SIGNS: Mapping[str, str] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_WORD = re.compile(r"[A-Za-z_]\w*")
_CHOICE = re.compile(r"\bmaybe\b|\||\bnot\b|…|\.\.\.")
_LONGEST_CHOICE = 80
"""A term of more characters is not written twice, once for each of two ops."""


class Mender:
    """Writes edits for one laid pattern: `names` and `nodes` are what its names and nodes stand for."""

    def __init__(
        self,
        pattern: Pattern,
        view: ProgramView,
        names: Mapping[str, object],
        nodes: Mapping[int, Op],
        rewrite: Span | None,
    ) -> None:
        self.pattern, self.view, self.names, self.nodes = pattern, view, names, nodes
        self.rewrite = rewrite
        self.known = set(_WORD.findall(rewrite.text if rewrite else ""))
        self.known |= set(_WORD.findall(pattern.span.text))

    # -- values as text ------------------------------------------------------------------------------

    def spelled(self, actual: object, at: Span, hint: str = "z") -> str:
        """A value as the rule writes it at a place: a name that means it there, a new one, or the constant."""
        if isinstance(actual, Op):
            return self.name_of(actual, at) or self.fresh(hint)
        if actual is None or isinstance(actual, bool):
            return str(actual).lower()
        if isinstance(actual, tuple):
            items: Sequence[object] = actual  # pyright: ignore[reportUnknownVariableType]
            return "[" + ", ".join(self.spelled(a, at, hint) for a in items) + "]"
        if isinstance(actual, str):
            return f'"{actual}"'
        return str(actual)

    def name_of(self, value: Op, at: Span) -> str | None:
        """A name that stands for a value, where a line above makes it or it comes from outside."""
        for name, known in self.names.items():
            if same(known, value):
                return name
        for index, known in self.nodes.items():
            node = self.pattern.nodes[index]
            if known is value and node.names and node.span.end <= at.start:
                return node.names[0]
        return None

    def fresh(self, hint: str) -> str:
        """A name that the rule does not have."""
        base = hint if hint not in ("x", "y", "xs", "") else "z"
        name, number = base, 1
        while name in self.known:
            number += 1
            name = f"{base}{number}"
        self.known.add(name)
        return name

    # -- the edits -------------------------------------------------------------------------------------

    def constant(self, node: Node, operand: Fixed, actual: object, name: str, at: int) -> Edits:
        """The number, axis or word that is found; an argument that the rule has not is added."""
        word = OPS.get(name)
        parameter = word.parameters[at] if word is not None and at < len(word.parameters) else None
        hint = _hint(parameter)
        if operand.span is not None:
            return (TextEdit(operand.span, self._argument(actual, operand.span, parameter, hint)),)
        if parameter is None or not node.span.text.endswith(")") or node.span == node.op_span:
            return ()
        end = Span(node.span.source, node.span.end - 1, node.span.end - 1)
        given = self._argument(actual, node.span, parameter, hint)
        return (TextEdit(end, f", {parameter.name} = {given}"),)

    def _argument(
        self, actual: object, at: Span, parameter: OpParameter | None, hint: str = "z"
    ) -> str:
        one = isinstance(actual, tuple) and len(actual) == 1  # pyright: ignore[reportUnknownArgumentType]
        if one and parameter is not None and parameter.kind == "dims":
            actual = actual[0]  # pyright: ignore
        return self.spelled(actual, at, hint)

    def listed(self, operand: Items, actual: object) -> Edits:
        """A list of other length, as it is found."""
        if not isinstance(actual, tuple) and not isinstance(actual, (int, float)):
            return ()
        return (TextEdit(operand.span, self.spelled(actual, operand.span)),)

    def renamed(self, span: Span, actual: object) -> Edits:
        """Another name where one stands for two values: that of the value found, or a new one."""
        if not _WORD.fullmatch(span.text) and not isinstance(actual, Op):
            return ()
        hint = span.text if _WORD.fullmatch(span.text) else "z"
        return (TextEdit(span, self.spelled(actual, span, hint)),)

    def turned(self, node: Node, places: tuple[int, int]) -> Edits:
        """The two operands of an op, each where the other stands."""
        first, second = ((node.args or ())[i] for i in places)
        if not isinstance(first, (NodeRef, ValueRef)) or not isinstance(
            second, (NodeRef, ValueRef)
        ):
            return ()
        infix = node.span == node.op_span
        texts = [_atom(o.span.text) if infix else o.span.text for o in (first, second)]
        return (TextEdit(first.span, texts[1]), TextEdit(second.span, texts[0]))

    def extra(self, node: Node, value: Op, below: Op, span: Span) -> Edits:
        """`maybe op(…)` around the text at `span`: the op that the model has more, on what the pattern has."""
        inside = span.text
        call = self._call_on(value, below, inside, span)
        if call is None:
            return ()
        text, may_go = call
        return (TextEdit(span, f"maybe {text}" if may_go else text),)

    def missing(self, node: Node, child: int) -> Edits:
        """The pattern's node may be left out, or goes, where the model has only what stands below it."""
        below = next(
            (o for o in node.args or () if isinstance(o, NodeRef) and o.index == child), None
        )
        if below is None:
            return ()
        others = [o for o in refs(node.operands) if isinstance(o, NodeRef) and o.index != child]
        if not others:
            return self._optional(node, below)
        if any(self.pattern.nodes[o.index].names for o in others):
            return ()  # lines of the pattern would be left over
        if node.names and _WORD.fullmatch(below.span.text):
            return ()  # a line of a pattern must be an op
        return (TextEdit(node.span, _atom(below.span.text)),)

    def bare(self, node: Node) -> Edits:
        """As `missing`, where nothing of the pattern stands below it."""
        below = [o for o in node.operands if isinstance(o, ValueRef)]
        return self._optional(node, below[0]) if len(below) == 1 else ()

    def _optional(self, node: Node, below: NodeRef | ValueRef) -> Edits:
        args = node.args or ()
        if args and args[0] is below and node.span != node.op_span:
            return (TextEdit(node.span, f"maybe {_bare(node.span.text)}"),)
        word = OPS.get(node.ops[0])
        if word is None:
            return ()
        first = 0 if args and args[0] is below else None
        if first is None and (word.commutes is None or args[word.commutes[1]] is not below):
            return ()
        texts = [_text(o) for o in args]
        if first is None and word.commutes is not None:
            i, j = word.commutes
            texts[i], texts[j] = texts[j], texts[i]
        call = _call(word, texts)
        return (TextEdit(node.span, f"maybe {call}"),) if call else ()

    def other(self, node: Node, value: Op, name: str, step: Step) -> Edits:
        """The op that is found beside the one that the pattern has; in its place where both would be long."""
        if (
            len(node.ops) == 1
            and node.span != node.op_span
            and _alike(self, node, step, name, value)
        ):
            return (TextEdit(node.op_span, f"({node.ops[0]} | {name})"),)
        instead = self._instead(value, name, step, node.span)
        if instead is None:
            return ()
        mine = _bare(node.span.text)
        if len(mine) > _LONGEST_CHOICE or _CHOICE.search(mine):
            return (TextEdit(node.span, instead),)
        return (TextEdit(node.span, f"({mine} | {_bare(instead)})"),)

    def _instead(self, value: Op, name: str, step: Step, at: Span) -> str | None:
        """The found op on the pattern's operands."""
        actual = self.view.args(value)
        if actual is None:
            return None
        texts: list[str | None] = []
        word = OPS.get(name)
        for position, one in enumerate(actual):
            operand = next((o for o, _, p in step.pairs if p == position), None)
            parameter = word.parameters[position] if word is not None else None
            if isinstance(operand, (NodeRef, ValueRef)):
                texts.append(operand.span.text)
            elif isinstance(operand, (Rest, Without)):
                return None
            elif isinstance(operand, Items) and any(
                not isinstance(o, Fixed) for o in operand.items
            ):
                texts.append(operand.span.text)
            elif parameter is not None and _is_default(parameter, one):
                texts.append(None)
            else:
                texts.append(self._argument(one, at, parameter, _hint(parameter)))
        if word is None:
            if value.kwargs or None in texts:
                return None
            return f"{name}({', '.join(t for t in texts if t is not None)})"
        sign = _SIGNS.get(name)
        if sign is not None and len([t for t in texts if t]) == 2:
            return f"({_atom(texts[0] or '')} {sign} {_atom(texts[1] or '')})"
        return _call(word, texts)

    def _call_on(self, value: Op, below: Op, inside: str, at: Span) -> tuple[str, bool] | None:
        """A call of the op at `value` with `inside` where `below` stands; whether it can be left out (`maybe`)."""
        actual, name = self.view.args(value), self.view.op(value)
        if actual is None or name == GETITEM:
            return None
        place = next((i for i, a in enumerate(actual) if a is below), None)
        if place is None:
            return None
        word = OPS.get(name)
        texts: list[str | None] = []
        for position, one in enumerate(actual):
            parameter = word.parameters[position] if word is not None else None
            if position == place:
                texts.append(inside)
            elif parameter is not None and _is_default(parameter, one):
                texts.append(None)
            else:
                texts.append(self._argument(one, at, parameter, _hint(parameter)))
        if word is None:
            if value.kwargs or not name.startswith("aten."):
                return None
            return f"{name}({', '.join(t for t in texts if t is not None)})", place == 0
        if place and word.commutes == (0, place):
            texts[0], texts[place] = texts[place], texts[0]
            place = 0
        call = _call(word, texts)
        return (call, place == 0) if call else None

    def unlike(self, child: Node, span: Span, actual: object) -> Edits:
        """Whatever stands there, by a name: only where the pattern's own lines all stay in use."""
        inside = _nodes_below(self.pattern, child.index)
        if any(self.pattern.nodes[i].names or len(self.pattern.users[i]) > 1 for i in inside):
            return ()
        return (TextEdit(span, self.spelled(actual, span)),)

    def outside(self, node: Node) -> Edits:
        """The value stays: the rewrite says so, `p = p`. One without a name gets one first."""
        if self.rewrite is None or node.ops == (GETITEM,):
            return self._kept(node.names[0]) if self.rewrite and node.names else ()
        if node.names:
            return self._kept(node.names[0])
        name = self.fresh("kept")
        line = _line_start(node.span)
        new = TextEdit(line, f"{name} = {_bare(node.span.text)}\n{' ' * (line.column - 1)}")
        return (new, TextEdit(node.span, name), *self._kept(name))

    def _kept(self, name: str) -> Edits:
        if self.rewrite is None:
            return ()
        text = self.rewrite.text
        close = self.rewrite.start + len(text[: text.rindex("}")].rstrip())
        first = _WORD.search(text, text.index("{"))
        column = Span(
            self.rewrite.source, self.rewrite.start + (first.start() if first else 0), close
        ).column
        return (
            TextEdit(
                Span(self.rewrite.source, close, close), f"\n{' ' * (column - 1)}{name} = {name}"
            ),
        )


# -- texts ---------------------------------------------------------------------------------------------


def _hint(parameter: OpParameter | None) -> str:
    return parameter.name if parameter is not None and parameter.kind == "value" else "z"


def _is_default(parameter: OpParameter, actual: Any) -> bool:
    if parameter.required:
        return False
    if parameter.default == "any":
        return True
    return not isinstance(actual, Op) and same_constant(
        parameter.default, actual, parameter.kind, None
    )


def _text(operand: Operand) -> str | None:
    """An operand as it is written, None where it is not."""
    if isinstance(operand, Anything):
        return None
    return operand.span.text if operand.span is not None else None


def _call(word: OpWord, texts: Sequence[str | None]) -> str | None:
    """A call with what is given; by name after the first argument that is not."""
    parts: list[str] = []
    named = False
    for parameter, text in zip(word.parameters, texts, strict=False):
        if text is None:
            named = True
        else:
            parts.append(f"{parameter.name} = {text}" if named else text)
    return f"{word.name}({', '.join(parts)})" if parts else None


def _alike(mender: Mender, node: Node, step: Step, name: str, value: Op) -> bool:
    """Whether the call as it is written would match, were the op's name the one found."""
    mine, found = OPS.get(node.ops[0]), OPS.get(name)
    if mine is None or found is None or len(mine.parameters) != len(found.parameters):
        return False
    if [p.kind for p in mine.parameters] != [p.kind for p in found.parameters]:
        return False
    first = (mender.view.args(value) or (None,))[0]
    rank = mender.view.rank(first) if isinstance(first, Op) else None
    return all(
        not isinstance(o, Fixed)
        or (not isinstance(a, Op) and same_constant(o.value, a, found.parameters[at].kind, rank))
        for o, a, at in step.pairs
    )


def _bare(text: str) -> str:
    """A term without the brackets around it."""
    while text.startswith("(") and _closes(text, 0) == len(text) - 1 and not _parts(text):
        text = text[1:-1].strip()
    return text


def _parts(text: str) -> bool:
    """Whether a text in brackets is a choice, which needs them."""
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "|" and depth == 1:
            return True
    return False


def _atom(text: str) -> str:
    """A term that may stand beside any operator: in brackets where it has operators of its own."""
    if re.fullmatch(r"[\w.]+", text):
        return text
    opened_at = re.match(r"[\w.]*[(\[]", text)
    if opened_at is not None and _closes(text, opened_at.end() - 1) == len(text) - 1:
        return text
    return f"({text})"


def _closes(text: str, at: int) -> int:
    """Where the bracket that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return -1


def _nodes_below(pattern: Pattern, index: int) -> set[int]:
    found = {index}
    for operand in refs(pattern.nodes[index].operands):
        if isinstance(operand, NodeRef):
            found |= _nodes_below(pattern, operand.index)
    return found


def _line_start(span: Span) -> Span:
    """Where the statement begins that holds a place: after the line's end, or the `{`, before it."""
    text = span.source.text
    start = max(text.rfind("\n", 0, span.start), _brace(span.source, span.start)) + 1
    while text[start] in " \t\r\n":
        start += 1
    return Span(span.source, start, start)


def _brace(source: Source, before: int) -> int:
    return source.text.rfind("{", 0, before)
