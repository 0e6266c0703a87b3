"""Guards on the values of a dataflow pattern: `shape(q) ~ [b, h, n, d]`, `scale is number`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

from graftc.diagnostics import fail
from graftc.language import syntax as s
from graftc.language.rules import Fact, KindGuard, ShapeDim, ShapeGuard, ValueGuard
from graftc.language.scope import Binding, Scope, listed, suggest

KINDS = ("number", "parameter", "tensor", "none")


def split_guards(
    scope: Scope, conditions: Sequence[s.Expr]
) -> tuple[tuple[ValueGuard, ...], tuple[s.Expr, ...]]:
    """The guards on values, and the conditions that are left; sizes that shapes name are bound.

    Mistakes go to the scope's log.
    """
    found: list[ValueGuard] = []
    others: list[s.Expr] = []
    for node in (part for c in conditions for part in _conjuncts(c)):
        inner = node.operand if isinstance(node, s.Unary) and node.op == "not" else node
        if isinstance(inner, s.IsKind):
            with scope.log.attempt():
                found.append(_kind(scope, inner, inner is not node))
        elif isinstance(inner, s.HasShape):
            with scope.log.attempt():
                if inner is not node:
                    fail("G379", "a shape cannot be negated", span=node.span)
                found.append(_shape(scope, inner))
        else:
            others.append(node)
    return tuple(found), tuple(others)


def kind_fact(scope: Scope, node: s.IsKind) -> Fact:
    """`x is number` beside `or` or under `not`: a fact of the value. Raises GraftError."""
    guard = _kind(scope, node, False)
    return Fact("is", guard.name, {"kind": guard.kind}, node.span)


def shape_alone(scope: Scope, node: s.HasShape) -> NoReturn:
    """`shape(x) ~ […]` where it may fail and the guard still hold: its sizes would have no value."""
    _shape(scope, node)
    fail(
        "G379",
        "a shape is joined to other guards by `and` alone: it gives names to sizes",
        span=node.span,
        help="write a rule for each, or compare `dim(x)`",
    )


def _conjuncts(node: s.Expr) -> Iterator[s.Expr]:
    if isinstance(node, s.Binary) and node.op == "and":
        yield from _conjuncts(node.left)
        yield from _conjuncts(node.right)
    else:
        yield node


def _value(scope: Scope, node: s.Expr, guard: str) -> str:
    if not isinstance(node, s.Path) or len(node.names) != 1:
        fail("G379", f"`{guard}` takes a name of the pattern", span=node.span, found=node.span.text)
    binding = scope.binding(node.names[0])
    if binding.site:
        fail(
            "G379",
            f"`{binding.name}` is a site, not a value of a dataflow pattern",
            span=node.span,
            help=f"write a fact of it, such as `kind({binding.name})`",
        )
    return binding.name


def _kind(scope: Scope, node: s.IsKind, negated: bool) -> KindGuard:
    name = _value(scope, node.value, "is")
    if node.kind.text not in KINDS:
        fail(
            "G379",
            f"nothing is a `{node.kind.text}`",
            span=node.kind.span,
            wanted=listed(KINDS),
            found=f"`{node.kind.text}`",
            help=suggest(node.kind.text, KINDS),
        )
    return KindGuard(name, node.kind.text, node.span, negated)  # type: ignore[arg-type]


def _shape(scope: Scope, node: s.HasShape) -> ShapeGuard:
    call = node.value
    is_shape = (
        isinstance(call, s.Call) and isinstance(call.head, s.Path) and call.head.text == "shape"
    )
    if not isinstance(call, s.Call) or not is_shape or len(call.arguments) != 1 or call.named:
        fail("G379", "`~` compares a shape", span=node.span, wanted="shape(x) ~ [b, n, d]")
    name = _value(scope, call.positional[0], "shape")
    dims = tuple(_dim(scope, item) for item in node.shape.items)
    if sum(d.rest for d in dims) > 1:
        fail("G379", "`…` stands once in a shape", span=node.shape.span)
    return ShapeGuard(name, dims, node.span)


def _dim(scope: Scope, item: s.Expr | s.DimProduct | s.Spread) -> ShapeDim:
    match item:
        case s.Number(value=int(value)):
            return ShapeDim((), item.span, number=value)
        case s.Path(names=(name,)):
            setting = scope.setting(name.text)
            if setting is not None:
                from graftc.language.expressions import whole

                return ShapeDim((), item.span, number=whole(scope, item, "a size", 1))
            _bind(scope, name)
            return ShapeDim((name.text,), item.span)
        case s.DimProduct(names=names):
            for name in names:
                _bind(scope, name)
            return ShapeDim(tuple(n.text for n in names), item.span)
        case s.Spread():
            return ShapeDim((), item.span, rest=True)
        case _:
            fail(
                "G379",
                "this is no size",
                span=item.span,
                wanted="a name, a number, (h d) or `…`",
                found=item.span.text,
            )


def _bind(scope: Scope, name: s.Name) -> None:
    known = scope.bindings.get(name.text)
    if known is None:
        scope.bindings[name.text] = Binding(name.text, name.span, None, True, False)
    elif known.site or known.made:
        fail(
            "G379",
            f"`{name.text}` is a value of the pattern, not a size",
            span=name.span,
            help="give the size another name",
        )
