"""`operator` items: from statements to ops with symbolic sizes, every mistake of shape told at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from graftc.diagnostics import Diagnostic, GraftError, Span, fail
from graftc.language import syntax as s
from graftc.language.scope import listed, suggest
from graftc.operators.spec import Arg, InitSource, OfSite, Slot, Value
from graftc.operators.written import Dim, Given, Number, Rounded, Setting, Shape, Step, Written

SITE_FACTS: dict[str, str] = {
    "dim": "int",
    "heads": "int",
    "kv_heads": "int",
    "head_dim": "int",
    "tokens": "int",
    "hidden": "int",
    "ratio": "float",
    "activation": "symbol",
    "causal": "bool",
    "gated": "bool",
}
"""Facts that an operator's parameter takes from the site: by `= site`, or by its name without a default."""

ACTIVATIONS = (
    *("gelu", "gelu_tanh", "silu", "relu", "relu_squared", "quick_gelu", "tanh", "sigmoid"),
)


@dataclass(frozen=True)
class Tensor:
    """A value inside an operator: its number, its sizes without the batch, the op that made it."""

    index: int
    shape: Shape
    step: int | None = None
    part: int = 0


@dataclass
class Body:
    """An operator as far as it is read."""

    item: s.OperatorItem
    args: tuple[Arg, ...]
    inputs: list[tuple[str, Shape]] = field(default_factory=list[tuple[str, Shape]])
    steps: list[Step] = field(default_factory=list[Step])
    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    names: dict[str, Span] = field(default_factory=dict[str, Span])
    inits: dict[str, InitSource] = field(default_factory=dict[str, InitSource])
    words: dict[int, str] = field(default_factory=dict[int, str])
    count: int = 0

    def arg(self, name: str) -> Arg | None:
        return next((a for a in self.args if a.name == name), None)

    @property
    def tokens(self) -> frozenset[str]:
        """The sizes that vary: of each input's first axis."""
        return frozenset(n for _, shape in self.inputs for n in shape[0].names)

    def add(self, step: Step) -> tuple[Tensor, ...]:
        self.steps.append(step)
        made = tuple(
            Tensor(self.count + i, shape, len(self.steps) - 1, i)
            for i, shape in enumerate(step.shapes)
        )
        self.count += len(made)
        return made


def read_body(item: s.OperatorItem, place: str) -> tuple[Written, Body]:
    """The operator's ops. Raises GraftError with the first mistake in each statement."""
    from graftc.language.written_ops import OPS

    body = Body(item, tuple(_arg(p) for p in item.parameters))
    for typed in item.inputs:
        shape = _shape_of_type(body, typed.type)
        body.values[typed.name.text] = Tensor(body.count, shape)
        body.inputs.append((typed.name.text, shape))
        body.count += 1
    problems: list[Diagnostic] = []
    broken: set[str] = set()
    returned: tuple[Tensor, ...] = ()
    for statement in item.statements:
        try:
            if isinstance(statement, s.Returns):
                returned = tuple(_value(body, v, OPS) for v in statement.values)
                _check_results(body, statement, returned)
            else:
                _assign(body, statement, OPS)
        except GraftError as error:
            # What reads a value that could not be made says nothing new.
            if not any(b in _words(statement) for b in broken):
                problems += error.diagnostics
            if isinstance(statement, s.Assign):
                broken |= {t.text for t in statement.targets}
    if problems:
        raise GraftError(*problems)
    written = Written(
        item.name.text,
        tuple(body.inputs),
        tuple(body.steps),
        tuple(t.index for t in returned),
        place,
    )
    return written, body


def _words(statement: s.Statement) -> set[str]:
    from graftc.language.resolve_match import read_names

    values = statement.values if isinstance(statement, s.Returns) else (statement.value,)
    return {n.text for v in values for n in read_names(v)}


def _arg(parameter: s.Parameter) -> Arg:
    """A parameter as an argument of the operator's spec; its kind is its default's."""
    name, default = parameter.name.text, parameter.default
    word = default.text if isinstance(default, s.Path) else None
    if default is None and name not in SITE_FACTS:
        return Arg(name, "int", required=True)
    if default is None or word == "site":
        kind = SITE_FACTS.get(name)
        if kind is None:
            fail(
                "G463",
                f"a site has no `{name}`",
                span=parameter.span,
                wanted=listed(SITE_FACTS),
                help=suggest(name, SITE_FACTS) or f"give it a default: `{name} = 4`",
            )
        return Arg(name, kind, OfSite(name), minimum=1 if kind == "int" else None)  # type: ignore[arg-type]
    if isinstance(default, s.Number):
        kind = "int" if isinstance(default.value, int) else "float"
        return Arg(name, kind, default.value, minimum=1 if kind == "int" else None)
    if word in ("true", "false"):
        return Arg(name, "bool", word == "true")
    if word is not None and "." not in word:
        choices = ACTIVATIONS if name == "activation" else ()
        return Arg(name, "symbol", word, choices=choices)
    fail(
        "G463",
        f"the default of `{name}` is no number or word",
        span=default.span,
        wanted="4, 0.5, true, relu or site",
        found=default.span.text,
    )


def _shape_of_type(body: Body, kind: s.Type) -> Shape:
    """`tokens[n, dim]`: the batch comes before, and is not written."""
    if kind.name.text != "tokens" or kind.shape is None or len(kind.shape.items) < 2:
        fail(
            "G467",
            f"an operator takes and gives tokens, not `{kind.span.text}`",
            span=kind.span,
            wanted="tokens[n, dim]",
            found=kind.span.text,
        )
    sizes: list[Dim] = []
    for at, size in enumerate(kind.shape.items):
        if isinstance(size, (s.Spread, s.DimProduct)):
            fail("G467", "a size is one name or a product", span=size.span, wanted="heads * d")
        first = at == 0 and isinstance(size, s.Path) and body.arg(size.text) is None
        sizes.append(Dim.named(size.span.text) if first else size_of(body, size))
    return tuple(sizes)


def size_of(body: Body, node: s.Expr) -> Dim:
    """A size: numbers, parameters and token counts with `+ - * /` and `round(…)`. Raises GraftError."""
    match node:
        case s.Number(value=value):
            return Dim.number(value)
        case s.Path(names=(name,)):
            arg = body.arg(name.text)
            if arg is not None and arg.kind in ("int", "float"):
                return Dim.named(name.text)
            if name.text in body.tokens:
                return Dim.named(name.text)
        case s.Binary(op=op, left=left, right=right) if op in "+-*/":
            a, b = size_of(body, left), size_of(body, right)
            try:
                return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
            except (ValueError, ZeroDivisionError):
                fail("G463", "a size is divided by a product, not a sum", span=node.span)
        case s.Call(head=s.Path(names=(name,)), arguments=(inner,)) if name.text == "round":
            if not isinstance(inner, (s.Named, s.Spread)):
                return Dim.named(Rounded(size_of(body, inner)))
        case _:
            pass
    sizes = [a.name for a in body.args if a.kind in ("int", "float")] + sorted(body.tokens)
    fail(
        "G463",
        f"`{node.span.text[:40]}` is no size",
        span=node.span,
        wanted=f"a number, or one of {listed(tuple(sizes))}, with + - * / and round(…)",
    )


def setting_of(body: Body, node: s.Expr, kind: str) -> Setting:
    """An op's option: a constant, or one of the operator's parameters."""
    if kind == "int":
        return size_of(body, node)
    value: Value = None
    match node:
        case s.Number(value=number):
            value = number
        case s.Path(names=(name,)):
            arg = body.arg(name.text)
            if arg is not None and arg.kind == kind:
                return Given(name.text)
            value = name.text == "true" if name.text in ("true", "false") else name.text
        case s.Binary(op="==", left=s.Path(names=(name,)), right=right) if kind == "bool":
            arg = body.arg(name.text)
            word = right.text if isinstance(right, s.Path) else None
            if arg is not None and word is not None:
                return Given(name.text, word == "true" if word in ("true", "false") else word)
        case _:
            pass
    wanted = {"bool": bool, "float": (int, float), "symbol": str}[kind]
    if not isinstance(value, wanted) or (kind == "float" and isinstance(value, bool)):
        fail(
            "G464",
            f"`{node.span.text[:40]}` is no {kind}",
            span=node.span,
            wanted=f"a {kind}, or a parameter of the operator that is one",
        )
    return value


Ops = dict[str, Callable[[Body, s.Call], tuple[Tensor, ...]]]


def _assign(body: Body, statement: s.Assign, ops: Ops) -> None:
    made = _values(body, statement.value, ops)
    if len(made) != len(statement.targets):
        fail(
            "G461",
            f"{len(made)} value{'s' if len(made) != 1 else ''} for {len(statement.targets)} names",
            span=statement.span,
            wanted=f"{len(made)} names",
            found=str(len(statement.targets)),
        )
    for target, value in zip(statement.targets, made, strict=True):
        body.values[target.text] = value
        body.words.setdefault(value.index, target.text)


def _value(body: Body, node: s.Expr, ops: Ops) -> Tensor:
    made = _values(body, node, ops)
    if len(made) != 1:
        fail(
            "G461",
            f"this gives {len(made)} values, and one is wanted",
            span=node.span,
            help="name them first: `a, b = …`",
        )
    return made[0]


def value_of(body: Body, node: s.Expr) -> Tensor:
    """The value of an expression inside an op's arguments. Raises GraftError."""
    from graftc.language.written_ops import OPS

    return _value(body, node, OPS)


_SIGNS = {"+": "add", "-": "sub", "*": "mul", "/": "div"}


def _values(body: Body, node: s.Expr, ops: Ops) -> tuple[Tensor, ...]:
    match node:
        case s.Path(names=(name,)) if name.text in body.values:
            return (body.values[name.text],)
        case s.Binary(op=op) if op in _SIGNS:
            return _binary(body, node, ops)
        case s.Unary(op="-", operand=operand):
            given = _value(body, operand, ops)
            return body.add(Step("neg", (given.index,), (given.shape,)))
        case s.Call(head=s.Path(names=(name,))):
            if name.text not in ops:
                fail(
                    "G460",
                    f"unknown op `{name.text}` in an operator",
                    span=name.span,
                    wanted=listed(ops, 60),
                    found=f"`{name.text}`",
                    help=suggest(name.text, ops),
                )
            return ops[name.text](body, node)
        case _:
            fail(
                "G460",
                f"`{node.span.text[:40]}` is no value",
                span=node.span,
                wanted="an input, a value computed above, or an op of them",
            )


def is_number(body: Body, node: s.Expr) -> bool:
    """Whether an operand is a number or a parameter, and no value."""
    if isinstance(node, s.Number):
        return True
    if isinstance(node, s.Path):
        return node.text not in body.values and body.arg(node.text) is not None
    if isinstance(node, s.Binary):
        return is_number(body, node.left) and is_number(body, node.right)
    return False


def number_of(body: Body, node: s.Expr) -> Number:
    if isinstance(node, s.Number):
        return Number(node.value)
    arg = body.arg(node.text) if isinstance(node, s.Path) else None
    if arg is not None and arg.kind == "float":
        return Number(Given(arg.name))
    return Number(size_of(body, node))


def _binary(body: Body, node: s.Binary, ops: Ops) -> tuple[Tensor, ...]:
    sides = (node.left, node.right)
    operands = [number_of(body, x) if is_number(body, x) else _value(body, x, ops) for x in sides]
    shapes = [x.shape for x in operands if isinstance(x, Tensor)]
    if not shapes:
        fail("G461", "an op has a value among its operands", span=node.span)
    shape = shapes[0] if len(shapes) == 1 else _broadcast(shapes[0], shapes[1], node)
    inputs = tuple(x.index if isinstance(x, Tensor) else x for x in operands)
    return body.add(Step(_SIGNS[node.op], inputs, (shape,)))


def _broadcast(a: Shape, b: Shape, node: s.Expr) -> Shape:
    one = Dim.number(1)
    if len(a) == len(b) and all(x == y or one in (x, y) for x, y in zip(a, b, strict=True)):
        return tuple(y if x == one else x for x, y in zip(a, b, strict=True))
    fail(
        "G461",
        f"shapes {shown(a)} and {shown(b)} do not go together",
        span=node.span,
        wanted="equal sizes, or 1",
        found=f"{shown(a)} and {shown(b)}",
    )


def shown(shape: Shape) -> str:
    """`[n, 3 * dim]`.

    >>> shown((Dim.named("n"), 3 * Dim.named("dim")))
    '[n, 3 * dim]'
    """
    return f"[{', '.join(map(str, shape))}]"


def _check_results(body: Body, statement: s.Returns, returned: tuple[Tensor, ...]) -> None:
    for value, kind, node in zip(returned, body.item.results, statement.values, strict=False):
        wanted = _shape_of_type(body, kind)
        if value.shape != wanted:
            fail(
                "G465",
                f"`{body.item.name.text}` returns another shape than its head says",
                span=node.span,
                wanted=shown(wanted),
                found=shown(value.shape),
            )


def slots_of(written: Written, body: Body) -> tuple[Slot, ...]:
    """Each named submodule, and the rows that a split names: `q, k, v = split(linear(…), 3)`."""
    from graftc.language.written_spec import row_slots

    found: list[Slot] = []
    last = {i for i, st in enumerate(written.steps) if st.op == "linear"}
    for i, step in enumerate(written.steps):
        if step.name is None:
            continue
        ends = i in last and len(written.returns) == 1 and _makes(written, i) == written.returns[0]
        found.append(Slot(step.name, step.name, last=ends))
        found += row_slots(written, body, i)
    return tuple(found)


def _makes(written: Written, at: int) -> int:
    return len(written.inputs) + sum(len(st.shapes) for st in written.steps[:at])
