"""The ops of an operator's body: what they take, and the shape that they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graftc.diagnostics import fail
from graftc.language import syntax as s
from graftc.language.scope import listed, suggest
from graftc.language.written import (
    ACTIVATIONS,
    Body,
    Ops,
    Tensor,
    number_of,
    setting_of,
    shown,
    size_of,
    value_of,
)
from graftc.operators.spec import Apply, Const, InitSource, Part
from graftc.operators.written import Dim, Given, Setting, Shape, Step

UNARY = (
    *("silu", "relu", "gelu", "tanh", "sigmoid", "elu", "softplus", "exp", "log", "sqrt", "rsqrt"),
    *("abs", "square", "sin", "cos"),
)


def _takes(node: s.Call, values: int | None, options: tuple[str, ...] = ()) -> None:
    name = node.head.span.text
    if values is not None and len(node.positional) != values:
        fail(
            "G464",
            f"`{name}` takes {values} value{'s' if values != 1 else ''}",
            span=node.span,
            found=str(len(node.positional)),
        )
    for option in node.named:
        if option.name.text not in options:
            fail(
                "G464",
                f"`{name}` has no option `{option.name.text}`",
                span=option.name.span,
                wanted=listed(options) or "no options",
                help=suggest(option.name.text, options),
            )


def _option(node: s.Call, name: str) -> s.Expr | None:
    return next((o.value for o in node.named if o.name.text == name), None)


def _set(body: Body, node: s.Call, name: str, kind: str, default: Setting) -> Setting:
    given = _option(node, name)
    return default if given is None else setting_of(body, given, kind)


_PLAIN = {"linear": "proj", "depthwise_conv": "filter"}


def _name(body: Body, node: s.Call) -> str:
    """The name of an op's parameters, which init and checkpoints use; `proj`, `filter` where none is said."""
    given = _option(node, "name")
    plain = _PLAIN.get(node.head.span.text, "norm")
    if given is None:
        number = 1 + sum(n == plain or n.startswith(f"{plain}_") for n in body.names)
        name, span = plain if number == 1 else f"{plain}_{number}", node.span
    elif isinstance(given, s.Path) and len(given.names) == 1:
        name, span = given.text, given.span
    else:
        fail("G462", "a name is one word", span=given.span, wanted="name = in_proj")
    if name in body.names or name in ("float32", "causal_sum", "training", "forward"):
        fail(
            "G462",
            f"`{name}` is the name of other parameters"
            if name in body.names
            else f"`{name}` cannot be a name here",
            span=span,
            help="give it another name",
        )
    body.names[name] = span
    init = _option(node, "init")
    if init is not None:
        body.inits[name] = _init(init)
    return name


def _init(node: s.Expr) -> InitSource:
    """`identity`, `site.out`, `concat(site.q, site.k)`: the first weights that the operator itself gives."""
    match node:
        case s.Path(names=(site, part)) if site.text == "site":
            return Part("site", part.text)
        case s.Path(names=(word,)):
            return Apply(word.text)
        case s.Call(head=s.Path(names=(word,))) if not node.named or word.text == "random":
            return Apply(word.text, tuple(_init(a) for a in node.positional))
        case s.Number(value=value):
            return Const(value)
        case _:
            fail(
                "G464",
                "this is no first value",
                span=node.span,
                wanted="identity, zero, random(0), site.out, concat(site.q, site.k, site.v)",
            )


def _linear(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2, ("name", "bias", "init"))
    x = value_of(body, node.positional[0])
    out = size_of(body, node.positional[1])
    settings: dict[str, Setting] = {
        "bias": _set(body, node, "bias", "bool", True),
        "into": x.shape[-1],
    }
    _fixed(body, node, x.shape[-1])
    _fixed(body, node, out)
    return body.add(
        Step("linear", (x.index,), ((*x.shape[:-1], out),), settings, _name(body, node))
    )


def _fixed(body: Body, node: s.Call, size: Dim) -> None:
    """Weights cannot grow with the tokens."""
    if size.names & body.tokens:
        fail(
            "G461",
            f"weights of `{node.head.span.text}` would depend on the number of tokens",
            span=node.span,
            wanted="a width that is no token count",
            found=str(size),
        )


def _depthwise_conv(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2, ("name", "causal", "init"))
    x = value_of(body, node.positional[0])
    if len(x.shape) != 2 or not x.shape[0].names & body.tokens:
        _shape(node, x, "[n, channels]")
    settings: dict[str, Setting] = {
        "kernel": size_of(body, node.positional[1]),
        "causal": _set(body, node, "causal", "bool", False),
    }
    causal = settings["causal"]
    if isinstance(causal, Given) and causal != Given("causal"):
        fail(
            "G464",
            "whether a convolution is causal is `true`, `false` or the parameter `causal`",
            span=node.span,
            found=f"`{causal.name}`",
            help="call the parameter `causal`",
        )
    step = Step("depthwise_conv", (x.index,), (x.shape,), settings, _name(body, node), "causal")
    return body.add(step)


def _shape(node: s.Call, x: Tensor, wanted: str) -> None:
    fail(
        "G461",
        f"`{node.head.span.text}` does not take {shown(x.shape)}",
        span=node.span,
        wanted=wanted,
        found=shown(x.shape),
    )


def _norm(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 1, ("name", "eps", "init"))
    x = value_of(body, node.positional[0])
    name = _name(body, node) if _option(node, "name") is not None else None
    settings = {"eps": _set(body, node, "eps", "float", 1e-5)}
    return body.add(Step(node.head.span.text, (x.index,), (x.shape,), settings, name))


def _split(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x, into = value_of(body, node.positional[0]), node.positional[1]
    width = x.shape[-1]
    if isinstance(into, s.Number) and isinstance(into.value, int) and 2 <= into.value <= 64:
        sizes = [width / Dim.number(into.value)] * into.value
    elif isinstance(into, s.ListOf) and len(into.items) >= 2:
        sizes = [
            size_of(body, i) for i in into.items if not isinstance(i, (s.DimProduct, s.Spread))
        ]
    else:
        fail(
            "G464",
            "`split` takes a number of equal parts, or their sizes",
            span=into.span,
            wanted="split(x, 3) or split(x, [2 * dim, dim])",
        )
    total = Dim.number(0)
    for size in sizes:
        total = total + size
    if total != width:
        fail(
            "G461",
            f"the parts of `split` make {total}, and there are {width}",
            span=into.span,
            wanted=str(width),
            found=str(total),
        )
    shapes = tuple((*x.shape[:-1], size) for size in sizes)
    return body.add(Step("split", (x.index,), shapes, {"equal": isinstance(into, s.Number)}))


def _concat(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, None)
    parts = [value_of(body, p) for p in node.positional]
    if len(parts) < 2:
        fail("G464", "`concat` takes two or more values", span=node.span)
    width = Dim.number(0)
    for part in parts:
        if part.shape[:-1] != parts[0].shape[:-1]:
            _shape(node, part, f"{shown(parts[0].shape[:-1])[:-1]}, …]")
        width = width + part.shape[-1]
    shape = (*parts[0].shape[:-1], width)
    return body.add(Step("concat", tuple(p.index for p in parts), (shape,)))


def _append(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x = value_of(body, node.positional[0])
    shape = (*x.shape[:-1], x.shape[-1] + Dim.number(1))
    return body.add(Step("append", (x.index, number_of(body, node.positional[1])), (shape,)))


def _reshape(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x, given = value_of(body, node.positional[0]), node.positional[1]
    if not isinstance(given, s.ListOf):
        fail("G464", "`reshape` takes sizes", span=given.span, wanted="[n, heads, dim / heads]")
    sizes = tuple(
        size_of(body, i) for i in given.items if not isinstance(i, (s.DimProduct, s.Spread))
    )
    have, want = Dim.number(1), Dim.number(1)
    for dim in x.shape:
        have = have * dim
    for dim in sizes:
        want = want * dim
    if have != want:
        fail(
            "G461",
            f"{shown(x.shape)} cannot become {shown(sizes)}",
            span=node.span,
            wanted=f"{have} numbers",
            found=f"{want}",
        )
    first = sizes[0] == x.shape[0]
    return body.add(Step("reshape", (x.index,), (sizes,), mixing="no" if first else "all"))


def _axis(body: Body, x: Tensor, node: s.Expr) -> int:
    """An axis, the batch not counted: 0 the first, -1 the last."""
    value: int | None = None
    match node:
        case s.Number(value=int() as number):
            value = number
        case s.Unary(op="-", operand=s.Number(value=int() as number)):
            value = len(x.shape) - number
        case _:
            pass
    if value is None or not 0 <= value < len(x.shape):
        fail(
            "G464",
            f"{shown(x.shape)} has no axis `{node.span.text}`",
            span=node.span,
            wanted=f"0..{len(x.shape) - 1}, or -1 for the last; the batch is not counted",
        )
    return value


def _transpose(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 3)
    x = value_of(body, node.positional[0])
    a, b = (_axis(body, x, n) for n in node.positional[1:])
    shape = list(x.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return body.add(Step("transpose", (x.index,), (tuple(shape),), {"axes": (a, b)}))


def _permute(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x, given = value_of(body, node.positional[0]), node.positional[1]
    items = given.items if isinstance(given, s.ListOf) else ()
    axes = tuple(_axis(body, x, i) for i in items if not isinstance(i, (s.DimProduct, s.Spread)))
    if sorted(axes) != list(range(len(x.shape))):
        fail(
            "G464",
            "`permute` names each axis once",
            span=given.span,
            wanted=f"the numbers 0..{len(x.shape) - 1} in an order",
        )
    shape = tuple(x.shape[a] for a in axes)
    return body.add(Step("permute", (x.index,), (shape,), {"axes": axes}))


def _repeat(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 3)
    x = value_of(body, node.positional[0])
    times, axis = size_of(body, node.positional[1]), _axis(body, x, node.positional[2])
    shape = tuple(d * times if i == axis else d for i, d in enumerate(x.shape))
    mixing = "all" if x.shape[axis].names & body.tokens else "no"
    return body.add(
        Step("repeat", (x.index,), (shape,), {"times": times, "axis": axis}, mixing=mixing)
    )


def _along(op: str, keeps_shape: bool) -> Callable[[Body, s.Call], tuple[Tensor, ...]]:
    def made(body: Body, node: s.Call) -> tuple[Tensor, ...]:
        _takes(node, 2, () if keeps_shape else ("keep",))
        x = value_of(body, node.positional[0])
        axis = _axis(body, x, node.positional[1])
        settings: dict[str, Setting] = {"axis": axis}
        shape: Shape = x.shape
        if not keeps_shape:
            keep = _set(body, node, "keep", "bool", False)
            if not isinstance(keep, bool):
                fail("G464", "`keep` is `true` or `false`", span=node.span)
            settings["keep"] = keep
            one = (Dim.number(1),) if keep else ()
            shape = (*x.shape[:axis], *one, *x.shape[axis + 1 :])
        along = bool(x.shape[axis].names & body.tokens)
        mixing = "no" if not along else "earlier" if op == "cumsum" else "all"
        return body.add(Step(op, (x.index,), (shape,), settings, mixing=mixing))

    return made


def _matmul(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x, y = (value_of(body, n) for n in node.positional)
    fits = len(x.shape) == len(y.shape) >= 2 and x.shape[-1] == y.shape[-2]
    if not fits or x.shape[:-2] != y.shape[:-2]:
        fail(
            "G461",
            f"`matmul` does not take {shown(x.shape)} and {shown(y.shape)}",
            span=node.span,
            wanted="[…, a, b] and […, b, c]",
            found=f"{shown(x.shape)} and {shown(y.shape)}",
        )
    shape = (*x.shape[:-1], y.shape[-1])
    # Over tokens it sums; beside a token axis in y, each of x's tokens meets each of y's.
    tokens = any(d.names & body.tokens for d in (x.shape[-1], y.shape[-1]))
    return body.add(Step("matmul", (x.index, y.index), (shape,), mixing="all" if tokens else "no"))


def _activate(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x = value_of(body, node.positional[0])
    kind = setting_of(body, node.positional[1], "symbol")
    if not isinstance(kind, Given) and kind not in ACTIVATIONS:
        fail(
            "G464",
            f"unknown activation `{kind}`",
            span=node.positional[1].span,
            wanted=listed(ACTIVATIONS),
            help=suggest(str(kind), ACTIVATIONS),
        )
    return body.add(Step("activate", (x.index,), (x.shape,), {"activation": kind}))


def _choose(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 3)
    condition = setting_of(body, node.positional[0], "bool")
    before = set(body.names)
    x, y = (value_of(body, n) for n in node.positional[1:])
    if set(body.names) - before:
        fail(
            "G466",
            "weights that only one choice uses",
            span=node.span,
            wanted="ops without parameters inside `choose`",
            help="compute them before, and choose between the results",
        )
    if x.shape != y.shape:
        fail(
            "G461",
            f"`choose` between shapes {shown(x.shape)} and {shown(y.shape)}",
            span=node.span,
            wanted="one shape",
        )
    return body.add(Step("choose", (x.index, y.index), (x.shape,), {"condition": condition}))


def _causal_sum(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 3)
    q, k, v = (value_of(body, n) for n in node.positional)
    if len(q.shape) != 3 or q.shape != k.shape or q.shape[:-1] != v.shape[:-1]:
        _shape(node, v, "q and k [n, heads, d], v [n, heads, e]")
    shape = (*q.shape[:-1], v.shape[-1])
    return body.add(Step("causal_sum", (q.index, k.index, v.index), (shape,), mixing="earlier"))


def _unary(op: str) -> Callable[[Body, s.Call], tuple[Tensor, ...]]:
    def made(body: Body, node: s.Call) -> tuple[Tensor, ...]:
        _takes(node, 1)
        x = value_of(body, node.positional[0])
        return body.add(Step(op, (x.index,), (x.shape,)))

    return made


def _like(body: Body, node: s.Call) -> tuple[Tensor, ...]:
    _takes(node, 2)
    x, other = (value_of(body, n) for n in node.positional)
    return body.add(Step("like", (x.index, other.index), (x.shape,)))


OPS: Ops = {
    "linear": _linear,
    "depthwise_conv": _depthwise_conv,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "split": _split,
    "concat": _concat,
    "append": _append,
    "reshape": _reshape,
    "transpose": _transpose,
    "permute": _permute,
    "repeat": _repeat,
    "matmul": _matmul,
    "softmax": _along("softmax", True),
    "cumsum": _along("cumsum", True),
    "sum": _along("sum", False),
    "mean": _along("mean", False),
    "activate": _activate,
    "choose": _choose,
    "causal_sum": _causal_sum,
    "float32": _unary("float32"),
    "like": _like,
    **{name: _unary(name) for name in UNARY},
}
"""Every op by name; `+ - * /` are ops too."""

DOCS: Mapping[str, str] = {
    "linear": "linear(x, width, name = …, bias = true, init = …): a linear map of the last axis",
    "depthwise_conv": "depthwise_conv(x, kernel, causal = false, name = …): one filter a channel along the tokens",
    "append": "append(x, 1): one more channel, all of one number",
    "activate": "activate(x, activation): by a parameter's name of it",
    "choose": "choose(causal, x, y): x where the parameter holds, else y; decided when it is built",
    "causal_sum": "causal_sum(q, k, v): Σ over j ≤ i of (q_i · k_j) v_j, linear in the tokens",
    "float32": "float32(x): at least float32",
    "like": "like(y, x): y in the dtype of x",
}
"""What the less plain ones mean, for docs and hovers."""
