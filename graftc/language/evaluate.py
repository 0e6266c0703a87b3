"""Values of expressions, and verdicts of guards with the reason in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from graftc.diagnostics import fail
from graftc.language.rules import Computed, Expr, Fact, Literal_, Operation
from graftc.operators.spec import Apply, Const, InitSource, Value

Facts = Callable[[Fact], Value]
Number = int | float


def settled(source: InitSource, facts: Facts) -> InitSource:
    """A source of weights with its computed numbers (`groups = heads(a) / 4`) put in.

    >>> from graftc.diagnostics import Source, Span
    >>> from graftc.operators.spec import Apply, Const, Part
    >>> heads = Fact("heads", "a", {}, Span(Source("a.graft", "x"), 0, 1))
    >>> pooled = Apply("mean_pool", (Part("a", "k"),), {"groups": Computed(None, heads)})
    >>> settled(pooled, lambda fact: 4).options
    {'groups': Const(value=4)}
    """
    if isinstance(source, Computed):
        return Const(evaluate(source.expr, facts))
    if not isinstance(source, Apply):
        return source
    options = {name: settled(option, facts) for name, option in source.options.items()}
    return Apply(source.policy, tuple(settled(a, facts) for a in source.args), options)


@dataclass(frozen=True)
class Verdict:
    """Whether a guard holds, and why (or why not)."""

    ok: bool
    reason: str


def evaluate(expr: Expr, facts: Facts) -> Value:
    """The value of an expression, a site's facts being given by `facts`.

    `/` on integers must divide; `%` is the remainder. Raises GraftError at the operation.

    >>> from graftc.diagnostics import Source, Span
    >>> here = Span(Source("a.graft", "x"), 0, 1)
    >>> heads = Fact("heads", "a", {}, here)
    >>> evaluate(Operation("/", (heads, Literal_(4, here)), here), lambda fact: 16)
    4
    """
    if isinstance(expr, Literal_):
        return expr.value
    if isinstance(expr, Fact):
        return facts(expr)
    op = expr.op
    if op in ("and", "or"):
        results = (bool(evaluate(a, facts)) for a in expr.args)
        return all(results) if op == "and" else any(results)
    values = [evaluate(a, facts) for a in expr.args]
    if op == "not":
        return not values[0]
    if op in ("==", "!="):
        return (values[0] == values[1]) is (op == "==")
    numbers = [_number(v, a) for v, a in zip(values, expr.args, strict=True)]
    if op == "neg":
        return -numbers[0]
    if op in ("min", "max"):
        return min(numbers) if op == "min" else max(numbers)
    left, right = numbers
    if op in ("/", "%"):
        return _divide(op, left, right, expr)
    if op in _COMPARE:
        return _COMPARE[op](left, right)
    return _ARITHMETIC[op](left, right)


_COMPARE: dict[str, Callable[[Number, Number], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_ARITHMETIC: dict[str, Callable[[Number, Number], Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def _number(value: Value, expr: Expr) -> Number:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(
            "G152",
            f"{shown(expr)} is not a number here",
            span=expr.span,
            wanted="a number",
            found=_show(value),
        )
    return value


def _divide(op: str, left: Number, right: Number, expr: Operation) -> Number:
    if right == 0:
        fail("G151", "division by zero", span=expr.span, found=f"{_described(expr.args[1], right)}")
    if op == "%":
        return left % right
    if isinstance(left, int) and isinstance(right, int):
        if left % right:
            _inexact(left, right, expr)
        return left // right
    return left / right


def _inexact(left: int, right: int, expr: Operation) -> NoReturn:
    a, b = (shown(e) for e in expr.args)
    fail(
        "G150",
        f"{left} / {right} is not a whole number",
        span=expr.span,
        wanted=f"{a} a multiple of {b}",
        found=f"{_described(expr.args[0], left)}, {left} % {right} is {left % right}",
        help=f"guard it: `where {a} % {b} == 0`",
    )


def holds(expr: Expr, facts: Facts) -> Verdict:
    """Whether a guard holds. The reason names what decided: the first part that fails.

    >>> from graftc.diagnostics import Source, Span
    >>> here = Span(Source("a.graft", "x"), 0, 1)
    >>> tokens = Fact("tokens", "a", {}, here)
    >>> holds(Operation(">=", (tokens, Literal_(64, here)), here), lambda fact: 16)
    Verdict(ok=False, reason='tokens(a) is 16, wanted >= 64')
    """
    if isinstance(expr, Operation):
        if expr.op == "and":
            return _all(expr, facts)
        if expr.op == "or":
            return _any(expr, facts)
        if expr.op == "not":
            inner = holds(expr.args[0], facts)
            if inner.ok:
                return Verdict(False, f"{inner.reason}, wanted not {shown(expr.args[0])}")
            return Verdict(True, inner.reason)
        if expr.op in ("==", "!=") or expr.op in _COMPARE:
            return _compared(expr, facts)
    ok = bool(evaluate(expr, facts))
    if isinstance(expr, Fact) and expr.name == "is":
        kind = str(expr.options["kind"])
        what = kind if kind == "none" else f"a {kind}"
        return Verdict(ok, f"{expr.binding} is {what if ok else f'not {what}'}")
    return Verdict(ok, f"{shown(expr)} is {_show(ok)}" + ("" if ok else ", wanted true"))


def _all(expr: Operation, facts: Facts) -> Verdict:
    reasons: list[str] = []
    for part in expr.args:
        verdict = holds(part, facts)
        if not verdict.ok:
            return verdict
        reasons.append(verdict.reason)
    return Verdict(True, " and ".join(reasons))


def _any(expr: Operation, facts: Facts) -> Verdict:
    reasons: list[str] = []
    for part in expr.args:
        verdict = holds(part, facts)
        if verdict.ok:
            return verdict
        reasons.append(verdict.reason)
    return Verdict(False, " and ".join(reasons))


def _compared(expr: Operation, facts: Facts) -> Verdict:
    left, right = expr.args
    op = expr.op
    if isinstance(left, Literal_) and not isinstance(right, Literal_):  # `64 <= tokens(a)`
        left, right = right, left
        op = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(op, op)
    ok = bool(evaluate(expr, facts))
    found, limit = evaluate(left, facts), evaluate(right, facts)
    reason = f"{shown(left)} is {_brief(found)}"
    wanted = shown(right)
    if not isinstance(right, Literal_):
        wanted += f", which is {_show(limit)}"
    return Verdict(ok, reason if ok else f"{reason}, wanted {op} {wanted}")


def _described(expr: Expr, value: Value) -> str:
    return shown(expr) if isinstance(expr, Literal_) else f"{shown(expr)} is {_show(value)}"


def _show(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else str(value)


def _brief(value: Value) -> str:
    """A value for a reader: a measured number is not written to its last digit."""
    text = _show(value)
    return f"{value:.4g}" if isinstance(value, float) and len(text) > 8 else text


_BINDS = {"or": 1, "and": 2, "not": 3, "+": 5, "-": 5, "*": 6, "/": 6, "%": 6, "neg": 7}


def shown(expr: Expr) -> str:
    """An expression as it is written.

    >>> from graftc.diagnostics import Source, Span
    >>> here = Span(Source("a.graft", "x"), 0, 1)
    >>> four = Literal_(4, here)
    >>> shown(Operation("*", (Operation("+", (four, four), here), Fact("dim", "a", {}, here)), here))
    '(4 + 4) * dim(a)'
    """
    if isinstance(expr, Literal_):
        return _show(expr.value)
    if isinstance(expr, Fact):
        if expr.name == "value":
            return expr.binding
        if expr.name == "is":
            return f"{expr.binding} is {expr.options['kind']}"
        options = "".join(f", {k} = {_show(v)}" for k, v in expr.options.items())
        return f"{expr.name}({expr.binding}{options})"
    if expr.op in ("min", "max"):
        return f"{expr.op}({', '.join(map(shown, expr.args))})"
    parts = [_bracketed(a, expr.op, right=i > 0) for i, a in enumerate(expr.args)]
    if expr.op in ("not", "neg"):
        return f"not {parts[0]}" if expr.op == "not" else f"-{parts[0]}"
    return f" {expr.op} ".join(parts)


def _bracketed(expr: Expr, parent: str, *, right: bool) -> str:
    text = shown(expr)
    if not isinstance(expr, Operation) or expr.op in ("min", "max"):
        return text
    inner, outer = _BINDS.get(expr.op, 4), _BINDS.get(parent, 4)
    return f"({text})" if inner < outer or (right and inner == outer) else text
