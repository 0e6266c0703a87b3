"""Changes of a dataflow pattern in words: each names what is in the model, what the rule wants, and one edit."""

from __future__ import annotations

from graftc.diagnostics import Span
from graftc.language.dataflow_ops import OPS
from graftc.program.flat import Op
from graftc.rewrite.dataflow.pattern import Fixed, Node
from graftc.rewrite.whynot.change import Change, source_line

_MEANINGLESS = ("x", "y", "xs")


def op_word(name: str) -> str:
    """An op's name as the language or ATen calls it: `add`, `threshold`.

    >>> op_word("aten.threshold.default"), op_word("softmax")
    ('threshold', 'softmax')
    """
    return name.split(".")[1] if name.startswith("aten.") else name


def value_word(value: object) -> str:
    """A value as the language writes it; a tensor by its node."""
    if isinstance(value, Op):
        return f"`{value.fqn or value.node.name}`"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(value_word(v) for v in value) + "]"  # pyright: ignore[reportUnknownVariableType]
    return str(value)


def wanted(node: Node) -> str:
    return " or ".join(f"`{o}`" for o in node.ops)


def extra(node: Node, value: Op, name: str, cost: float) -> Change:
    word = op_word(name)
    text = f"an extra `{word}` after {wanted(node)}"
    fix = f"write `maybe {word}({node.span.text})`" if name in OPS else None
    return Change("extra", cost, text, node.span, fix, source_line(value))


def missing(node: Node, value: Op, cost: float) -> Change:
    text = f"no {wanted(node)}: the rule has `{node.span.text}`"
    fix = f"write `maybe {node.ops[0]}(…)` for `{node.span.text}`"
    return Change("missing", cost, text, node.op_span, fix, source_line(value))


def other(node: Node, value: Op, name: str, cost: float) -> Change:
    word = op_word(name)
    text = f"`{word}` in place of {wanted(node)}"
    fix = f"write `({' | '.join((*node.ops, word))})(…)`"
    return Change("op", cost, text, node.op_span, fix, source_line(value))


def order(node: Node, value: Op, name: str) -> Change:
    text = f"the operands of `{op_word(name)}` stand the other way round"
    fix = f"turn the operands of `{node.span.text}` round"
    return Change("order", 0.8, text, node.span, fix, source_line(value))


def constant(
    node: Node,
    operand: Fixed,
    actual: object,
    name: str,
    at: int,
    kind: str,
    value: Op,
    cost: float,
) -> Change:
    """A number, axis, flag or word that is another; an argument that is given and the rule has not."""
    op = op_word(name)
    span = operand.span or node.op_span
    found, want = value_word(actual), value_word(operand.value)
    if kind == "word":
        found, want = (
            f'"{v}"' if isinstance(v, str) else value_word(v) for v in (actual, operand.value)
        )
    word = OPS.get(name)
    parameter = word.parameters[at].name if word is not None and at < len(word.parameters) else ""
    fix = f"write `{found.strip('`')}` for `{span.text}`" if operand.span else None
    line = source_line(value)
    if operand.span is None and operand.value is None:
        text = f"the `{parameter}` of `{op}` is given: {found}, and the rule has none"
        fix = f"write `{op}(…, {parameter} = {'m' if isinstance(actual, Op) else found})`"
        return Change("mask" if parameter == "mask" else "operand", cost, text, span, fix, line)
    if kind in ("dim", "dims"):
        if isinstance(actual, tuple) and len(actual) == 1:  # pyright: ignore[reportUnknownArgumentType]
            found = value_word(actual[0])
        return Change("axis", cost, f"`{op}` is over {found}, wanted {want}", span, fix, line)
    if operand.span is None:
        fix = f"write `{op}(…, {parameter} = {found})`"
    if parameter in _MEANINGLESS or not parameter:
        return Change("constant", cost, f"`{op}` takes {found}, wanted {want}", span, fix, line)
    text = f"the `{parameter}` of `{op}` is {found}, wanted {want}"
    return Change("constant", cost, text, span, fix, line)


def listed(node: Node, span: Span, actual: object, name: str, value: Op, cost: float) -> Change:
    text = f"`{op_word(name)}` takes {value_word(actual)}, wanted {span.text}"
    return Change("constant", cost, text, span, None, source_line(value))


def two_values(
    name: str, span: Span, first: object, second: object, at: Op | None = None
) -> Change:
    text = f"`{name}` is two values here: {value_word(first)} and {value_word(second)}"
    return Change("same", 1.0, text, span, "give one of them another name", source_line(at))


def unlike(child: Node, span: Span, at: Op, actual: object) -> Change:
    name = child.names[0] if child.names else child.span.text
    text = f"{value_word(actual)} stands where `{name}` should: no {wanted(child)} makes it"
    return Change("operand", 1.5, text, span, None, source_line(at))


def outside(node: Node, value: Op, user: Op | None) -> Change:
    name = f"`{node.names[0]}`" if node.names else f"the result of `{node.span.text}`"
    by = f"used by `{user.node.name}`" if user is not None else "returned by the model"
    where = f" in {user.path}" if user is not None and user.path else ""
    text = f"{name} is also {by}{where}, outside the match"
    fix = (
        f"keep {name}: read it in `rewrite`"
        if node.names
        else "name the value and read it in `rewrite`"
    )
    return Change("outside", 1.0, text, node.span, fix, source_line(user or value))
