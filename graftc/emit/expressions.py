"""One FX node as one Python expression.

The templates of `graftc.emit.table` are parsed once into syntax trees; an expression is a template
with the node's arguments put in. Working on trees leaves precedence and brackets to `ast.unparse`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import fx

from graftc.diagnostics import fail
from graftc.emit.literals import Operand, index, literal, parse, plain_call, schema_arguments
from graftc.emit.opaque import NAMESPACES, library_of
from graftc.emit.special_forms import SPECIAL
from graftc.emit.table import IGNORED_ARGUMENTS, PYTHON_FUNCTIONS, TEMPLATES


def expression(node: fx.Node, operand: Operand, site: str) -> ast.expr:
    """The expression of a `call_function` or `call_method` node; `operand` gives those it uses.

    `site` is the path of the module that holds the node. Raises GraftError for a function that a
    file of torch alone cannot name.
    """
    if node.op == "call_method":
        arguments = [literal(a, operand) for a in node.args]
        keywords = [ast.keyword(k, literal(v, operand)) for k, v in node.kwargs.items()]
        return ast.Call(ast.Attribute(arguments[0], str(node.target)), arguments[1:], keywords)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _operator_call(node, target, operand, site)
    if target is getattr:
        return ast.Attribute(literal(node.args[0], operand), str(node.args[1]))
    if target is operator.getitem:
        return ast.Subscript(literal(node.args[0], operand), index(node.args[1], operand))
    return _python_call(node, operand, site)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _operator_call(
    node: fx.Node, target: torch._ops.OpOverload, operand: Operand, site: str
) -> ast.expr:
    namespace = target.namespace
    if namespace not in NAMESPACES:
        library_of(target, site)
    name = str(target).removeprefix("aten.")
    special = SPECIAL.get(name)
    if special is not None:
        made = special(node, schema_arguments(node), operand)
        if made is not None:
            return made
    template = TEMPLATES.get(name) if namespace == "aten" else None
    if template is not None:
        made = _fill(template, node, target, operand)
        if made is not None:
            return made
    return plain_call(f"torch.ops.{target}", node, operand)


def _python_call(node: fx.Node, operand: Operand, site: str) -> ast.expr:
    target = cast("Callable[..., Any]", node.target)
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    template = PYTHON_FUNCTIONS.get(f"{module}.{name}")
    if template is not None:
        names: list[str] = ["self", "other"]
        given: dict[str, Any] = dict(zip(names, node.args, strict=False))
        return _Substitute(given, {}, operand).visit(_tree(template))
    for prefix, holder in (("torch", torch), ("F", torch.nn.functional)):
        if getattr(holder, name, None) is target:
            return plain_call(f"{prefix}.{name}", node, operand)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return plain_call(f"torch.ops.higher_order.{name}", node, operand)
    if module == "math":
        return plain_call(f"math.{name}", node, operand)
    fail(
        "G601", f"`{module}.{name}` cannot be written to a file that needs torch alone", site=site,
        help="replace the call by plain PyTorch",
    )  # fmt: skip


def _fill(
    template: str, node: fx.Node, target: torch._ops.OpOverload, operand: Operand
) -> ast.expr | None:
    """The template with the node's arguments, None if it cannot say all of them."""
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    given = schema_arguments(node)
    tree = _tree(template)
    named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for name, value in given.items():
        unsaid = name not in named and name not in IGNORED_ARGUMENTS
        if unsaid and not _is_default(name, value, defaults):
            return None
    absent = {n: d for n, d in defaults.items() if _is_default(n, given[n], defaults)}
    return _Substitute(given, absent, operand).visit(tree)


def _is_default(name: str, value: Any, defaults: dict[str, Any]) -> bool:
    if name not in defaults or isinstance(value, fx.Node):
        return False
    default = defaults[name]
    if isinstance(value, (list, tuple)) and isinstance(default, int):
        return all(v == default for v in cast("list[Any]", value))
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(cast("list[Any]", value)) == list(cast("list[Any]", default))
    return type(value) is type(default) and value == default


@cache
def _parsed(template: str) -> ast.expr:
    return parse(template)


def _tree(template: str) -> ast.expr:
    import copy

    return copy.deepcopy(_parsed(template))


def _name_of(argument: ast.expr) -> str:
    name = argument.value if isinstance(argument, ast.Starred) else argument
    return name.id if isinstance(name, ast.Name) else ""


class _Substitute(ast.NodeTransformer):
    """Puts arguments in place of a template's names and leaves those at their default out."""

    def __init__(self, given: dict[str, Any], absent: dict[str, Any], operand: Operand) -> None:
        self.given, self.absent, self.operand = given, absent, operand

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == "MODULE":
            return ast.Name("self")
        if node.id not in self.given:
            return node
        value = self.given[node.id]
        if node.id == "dim" and isinstance(value, list) and len(cast("list[Any]", value)) == 1:
            value = value[0]  # a person writes mean(dim=-1), not mean(dim=[-1])
        return literal(value, self.operand)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        arguments: list[ast.expr] = []
        keywords: list[ast.keyword] = []
        said = [i for i, a in enumerate(node.args) if _name_of(a) not in self.absent]
        for argument in node.args[: said[-1] + 1 if said else 0]:
            spread = isinstance(argument, ast.Starred)
            name = argument.value if isinstance(argument, ast.Starred) else argument
            key = _name_of(argument)
            if spread and isinstance(self.given[key], (list, tuple)):
                arguments += [literal(v, self.operand) for v in self.given[key]]
            else:
                arguments.append(self.visit(name))
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Name) and keyword.value.id in self.absent:
                continue
            keywords.append(ast.keyword(keyword.arg, self.visit(keyword.value)))
        return ast.Call(self.visit(node.func), arguments, keywords)
