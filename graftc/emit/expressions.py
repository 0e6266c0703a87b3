"""One FX node as one Python expression.

The templates of `graftc.emit.table` are parsed once into syntax trees; an expression is a template
with the node's arguments put in. Working on trees leaves precedence and brackets to `ast.unparse`.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import fx

from graftc.diagnostics import fail
from graftc.emit.table import IGNORED_ARGUMENTS, PYTHON_FUNCTIONS, TEMPLATES

Operand = Callable[[fx.Node], ast.expr]

# A whole dimension's end, as capture writes it.
_TO_THE_END = 2**62
_NAMESPACES = {"aten", "prims", "prim", "higher_order"}


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
        return ast.Subscript(literal(node.args[0], operand), _index(node.args[1], operand))
    return _python_call(node, operand, site)


def literal(value: Any, operand: Operand) -> ast.expr:
    """An argument as syntax: a node, a number, a dtype, a list of such.

    >>> ast.unparse(literal([1, torch.float32, None], lambda n: ast.Name(n.name)))
    '[1, torch.float32, None]'
    """
    if isinstance(value, fx.Node):
        return operand(value)
    if isinstance(value, (list, tuple)):
        elements = [literal(v, operand) for v in cast("list[Any]", value)]
        return ast.Tuple(elements) if isinstance(value, tuple) else ast.List(elements)
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return ast.Dict(
            [literal(k, operand) for k in entries], [literal(v, operand) for v in entries.values()]
        )
    if isinstance(value, slice):
        return _index(value, operand)
    if isinstance(value, float) and not math.isfinite(value):
        return parse(f'float("{value}")')
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return parse(str(value))
    if isinstance(value, torch.device):
        return parse(f'torch.device("{value}")')
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, str)):
        return ast.Constant(value)
    raise TypeError(f"no Python literal for {type(value).__name__}")


def parse(text: str) -> ast.expr:
    """Python text as syntax."""
    return ast.parse(text, mode="eval").body


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


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen node by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def _operator_call(
    node: fx.Node, target: torch._ops.OpOverload, operand: Operand, site: str
) -> ast.expr:
    namespace = target.namespace
    if namespace not in _NAMESPACES:
        fail(
            "G601", f"`{target}` is an operator of the library `{namespace}`, not of torch",
            site=site, wanted="operators that a file of torch alone can call",
            help=f"replace what calls `torch.ops.{namespace}` by plain PyTorch",
        )  # fmt: skip
    name = str(target).removeprefix("aten.")
    special = _SPECIAL.get(name)
    if special is not None:
        made = special(node, schema_arguments(node), operand)
        if made is not None:
            return made
    template = TEMPLATES.get(name) if namespace == "aten" else None
    if template is not None:
        made = _fill(template, node, target, operand)
        if made is not None:
            return made
    return _plain_call(f"torch.ops.{target}", node, operand)


def _plain_call(function: str, node: fx.Node, operand: Operand) -> ast.expr:
    return ast.Call(
        parse(function),
        [literal(a, operand) for a in node.args],
        [ast.keyword(k, literal(v, operand)) for k, v in node.kwargs.items()],
    )


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
            return _plain_call(f"{prefix}.{name}", node, operand)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _plain_call(f"torch.ops.higher_order.{name}", node, operand)
    if module == "math":
        return _plain_call(f"math.{name}", node, operand)
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


def _index(value: Any, operand: Operand) -> ast.expr:
    """What stands between the brackets of `x[…]`."""
    if isinstance(value, tuple):
        return ast.Tuple([_index(v, operand) for v in cast("tuple[Any, ...]", value)])
    if isinstance(value, slice):
        parts = [
            None if p is None else literal(p, operand)
            for p in (value.start, value.stop, value.step)
        ]
        return cast("ast.expr", ast.Slice(*parts))
    if value is Ellipsis:
        return ast.Constant(...)
    return literal(value, operand)


def _leading(dim: int, ndim: int | None, last: ast.expr) -> ast.expr:
    """`[:, :, last]` for dimension `dim`; from the end for a negative one."""
    if dim == -1 and ndim != 1:
        return ast.Tuple([ast.Constant(...), last])
    whole: list[ast.expr] = [cast("ast.expr", ast.Slice()) for _ in range(dim)]
    return ast.Tuple([*whole, last]) if whole else last


def _ndim(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None


def _slice(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    dim, start, end, step = given["dim"], given["start"], given["end"], given["step"]
    if not isinstance(dim, int) or dim < -1:
        return None
    start = None if start == 0 else start
    end = None if isinstance(end, int) and end >= _TO_THE_END else end
    step = None if step == 1 else step
    bounds = _index(slice(start, end, step), operand)
    return ast.Subscript(operand(given["self"]), _leading(dim, _ndim(given["self"]), bounds))


def _select(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    dim = given["dim"]
    # A negative index is fine; a dimension counted from the end is not worth a reader's time.
    if not isinstance(dim, int) or dim < -1 or isinstance(given["index"], fx.Node):
        return None
    at = literal(given["index"], operand)
    return ast.Subscript(operand(given["self"]), _leading(dim, _ndim(given["self"]), at))


def _gather(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    """`x[:, rows]`: indexing by tensors."""
    whole = cast("ast.expr", ast.Slice())
    at = [whole if i is None else literal(i, operand) for i in given["indices"]]
    return ast.Subscript(operand(given["self"]), ast.Tuple(at) if len(at) > 1 else at[0])


def _squeeze(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    """A squeeze of a dimension that is not 1 does nothing here, and is an error in ONNX."""
    value = given["self"].meta.get("val") if isinstance(given["self"], fx.Node) else None
    size = value.shape[given["dim"]] if isinstance(value, torch.Tensor) and value.ndim else None
    return operand(given["self"]) if isinstance(size, int) and size != 1 else None


def _einsum(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    if given.get("path") is not None:
        return None
    tensors = [literal(t, operand) for t in given["tensors"]]
    return ast.Call(parse("torch.einsum"), [ast.Constant(given["equation"]), *tensors], [])


def _sum_with_factor(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    """`add(x, y, alpha=2)` has no infix form that rounds alike."""
    if given.get("alpha", 1) == 1:
        return None
    return _plain_call(f"torch.{'sub' if 'sub' in str(node.target) else 'add'}", node, operand)


def _dropout(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    return operand(given["input"]) if given["train"] is False else None


def _dim_arange(node: fx.Node, given: dict[str, Any], operand: Operand) -> ast.expr | None:
    if not isinstance(given.get("start", 0), int) or given.get("start", 0) != 0:
        return None
    keywords = [
        ast.keyword(k, literal(given[k], operand))
        for k in ("dtype", "device")
        if given[k] is not None
    ]
    return ast.Call(parse("torch.arange"), [literal(given["end"], operand)], keywords)


_SPECIAL: dict[str, Callable[[fx.Node, dict[str, Any], Operand], ast.expr | None]] = {
    "slice.Tensor": _slice,
    "select.int": _select,
    "einsum.default": _einsum,
    "squeeze.dim": _squeeze,
    "index.Tensor": _gather,
    "add.Tensor": _sum_with_factor,
    "sub.Tensor": _sum_with_factor,
    "rsub.Scalar": lambda n, g, o: None,
    "dropout.default": _dropout,
    "arange.start": _dim_arange,
}
