"""Which module is an attention, which an MLP: told from dataflow, never from names.

The anchors are ops: `scaled_dot_product_attention`, or a softmax between two products;
an activation between two linears. From an anchor we walk to the linears around it; the deepest
module that holds them all is the site. Where q, k and v come from tells self-, cross- and
joint attention apart.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from graftc.program.flat import Flat, Op, backward, common_path
from graftc.program.program import ATEN, size_hint

LINEARS = frozenset({ATEN.linear.default, ATEN.addmm.default})
CONVS = frozenset({ATEN.conv1d.default, ATEN.conv2d.default, ATEN.conv3d.default})
NORMS = {
    ATEN.layer_norm.default: "layer_norm",
    ATEN.rms_norm.default: "rms_norm",
    ATEN.group_norm.default: "group_norm",
    ATEN.batch_norm.default: "batch_norm",
}
ACTIVATIONS = {
    ATEN.gelu.default: "gelu",
    ATEN.silu.default: "silu",
    ATEN.relu.default: "relu",
    ATEN.tanh.default: "tanh",
    ATEN.sigmoid.default: "sigmoid",
    ATEN.leaky_relu.default: "leaky_relu",
}
MOVEMENTS = frozenset(
    getattr(getattr(ATEN, name), overload)
    for name, overload in [
        ("view", "default"), ("reshape", "default"), ("transpose", "int"), ("permute", "default"),
        ("chunk", "default"), ("split", "Tensor"), ("split_with_sizes", "default"), ("unbind", "int"),
        ("select", "int"), ("slice", "Tensor"), ("unsqueeze", "default"), ("squeeze", "dim"),
        ("contiguous", "default"), ("clone", "default"), ("flatten", "using_ints"),
        ("unflatten", "int"), ("expand", "default"), ("tensor_split", "sections"), ("to", "dtype"),
    ]
)  # fmt: skip
_SDPA = ATEN.scaled_dot_product_attention.default
_SOFTMAX = frozenset({ATEN.softmax.int, ATEN._softmax.default})
_MASKINGS = frozenset(
    {ATEN.masked_fill.Scalar, ATEN.masked_fill.Tensor, ATEN.where.self, ATEN.where.ScalarOther}
)
_SUMS = frozenset({ATEN.add.Tensor, ATEN.sub.Tensor})
_PRODUCTS = frozenset({ATEN.matmul.default, ATEN.bmm.default, ATEN.baddbmm.default})


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention found: the module that is its site, its kind, the ops around the anchor."""

    path: str
    kind: str
    anchor: Op
    query: Op
    key: Op
    value: Op
    q: tuple[Op, ...]
    k: tuple[Op, ...]
    v: tuple[Op, ...]
    out: Op | None
    mask: Op | None
    causal: bool
    rotary: bool
    normed: bool


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP found: the module that is its site, its linears and its activation."""

    path: str
    up: Op
    gate: Op | None
    down: Op
    activation: Op
    name: str


@dataclass(frozen=True, eq=False)
class Refusal:
    """Ops that look like an attention or an MLP and are none, or are no module's own: what `explain` says.

    `path`: the deepest called module that holds them; `op`: the op that decided; `reason`: in words, after the path.
    """

    role: str
    path: str
    anchor: Op
    op: Op
    reason: str


Refused = list[Refusal]


def is_linear(op: Op) -> bool:
    return op.kind == "op" and op.target in LINEARS


def linear_input(op: Op) -> Op:
    return op.args[1] if op.target is ATEN.addmm.default else op.args[0]


def attentions(flat: Flat, refused: Refused | None = None) -> list[Attention]:
    """Every attention of a model, in execution order; what nearly was one goes to `refused`."""
    found: list[Attention] = []
    refused = [] if refused is None else refused
    for op in flat.ops:
        if op.kind == "op" and op.target is _SDPA:
            attention = _around(
                flat,
                refused,
                op,
                op,
                op.args[0],
                op.args[1],
                op.args[2],
                _mask_of(op),
                bool(op.argument(5, "is_causal", False)),
            )
        elif op.kind == "op" and op.target in _SOFTMAX:
            attention = _written_out(flat, refused, op)
        else:
            continue
        if attention is not None:
            found.append(attention)
    return found


def _mask_of(op: Op) -> Op | None:
    mask = op.argument(3, "attn_mask")
    return mask if isinstance(mask, Op) else None


def _written_out(flat: Flat, refused: Refused, softmax: Op) -> Attention | None:
    """softmax between two products."""
    scores = backward(softmax, lambda o: o.kind == "op" and o.target in _PRODUCTS)
    outs = [o for o in _forward(softmax, 4) if o.target in _PRODUCTS]
    if not scores or not outs:
        what = (
            "its softmax reads no product of two tensors"
            if not scores
            else "the result of its softmax is multiplied by no value"
        )
        path = flat.called(softmax.path)
        refused.append(Refusal("attention", path, softmax, softmax, what))
        return None
    score, out = scores[-1], outs[0]
    offset = 1 if score.target is ATEN.baddbmm.default else 0
    mask = score.args[0] if offset else _masking(softmax, score)
    return _around(
        flat,
        refused,
        softmax,
        out,
        score.args[offset],
        score.args[offset + 1],
        out.args[1],
        mask,
        False,
    )


def _masking(softmax: Op, score: Op) -> Op | None:
    """The op between scores and softmax that masks: what it hides (the future, padding) is not known."""
    for op in _between(softmax, {score.index}):
        if op.target in _MASKINGS:
            return op
        if op.target in _SUMS and all(isinstance(a, Op) for a in op.args[:2]):
            return op
    return None


def _between(end: Op, starts: set[int]) -> list[Op]:
    """The ops after `starts` on the way to `end`, both left out where they are an end."""
    memo: dict[int, bool] = {}

    def from_start(op: Op) -> bool:
        if op.index not in memo:
            memo[op.index] = op.index in starts or (
                op.kind == "op"
                and op.target is not ATEN.sym_size.int
                and op.index > min(starts)
                and any(from_start(o) for o in op.operands)
            )
        return memo[op.index]

    found: list[Op] = []
    stack = [end]
    seen: set[int] = set()
    while stack:
        op = stack.pop()
        if op.index in seen or op.index in starts or not from_start(op):
            continue
        seen.add(op.index)
        found.append(op)
        stack.extend(op.operands)
    return found


def _around(
    flat: Flat,
    refused: Refused,
    anchor: Op,
    result: Op,
    query: Op,
    key: Op,
    value: Op,
    mask: Op | None,
    causal: bool,
) -> Attention | None:
    def linears(op: Op) -> tuple[Op, ...]:
        return (op,) if is_linear(op) else tuple(backward(op, is_linear))

    q, k, v = linears(query), linears(key), linears(value)
    if not q or not k or not v:
        name, made = next(
            (n, o) for n, o, found in (("q", query, q), ("k", key, k), ("v", value, v)) if not found
        )
        refused.append(
            Refusal(
                "attention",
                flat.called(anchor.path),
                anchor,
                made,
                f"its {name} comes from no linear: {op_name(made)} makes it",
            )
        )
        return None
    sources = [{linear_input(o).index for o in part} for part in (q, k, v)]
    if len(sources[0]) > 1 and sources[0] == sources[1]:
        kind = "joint_attention"
    elif sources[0] == sources[1] == sources[2]:
        kind = "self_attention"
    else:
        kind = "cross_attention"
    out = _next_linear(result)
    members = [anchor, *q, *k, *v]
    found = _site(flat, members, [*q, *k, *v], out, result)
    if found is None:
        path = flat.called(common_path([*members, *([] if out is None else [out])]))
        op, reason = _why_not_just(flat, path, [*q, *k, *v], result if out is None else out)
        refused.append(Refusal("attention", path, anchor, op, reason))
        return None
    path, out = found
    return Attention(
        path,
        kind,
        anchor,
        query,
        key,
        value,
        q,
        k,
        v,
        out,
        mask,
        causal,
        rotary=_multiplied(query, q),
        normed=any(o.target in NORMS for o in _between(query, {p.index for p in q})),
    )


def _site(
    flat: Flat, members: list[Op], linears: list[Op], out: Op | None, result: Op
) -> tuple[str, Op | None] | None:
    """The module that is the attention and nothing else, and its output projection if that is inside.

    BERT's `attention` also adds the residual and normalises; its `attention.self` is the site then.
    """
    if out is not None:
        path = flat.called(common_path([*members, out]))
        if _is_just(flat, path, linears, out):
            return path, out
    path = flat.called(common_path(members))
    return (path, None) if _is_just(flat, path, linears, result) else None


def _is_just(flat: Flat, path: str, linears: list[Op], result: Op) -> bool:
    """Whether a module's inputs reach the linears, and `result` its output, through movements alone.

    A norm before or a residual after would be lost if the module were replaced.
    """
    call = flat.first_calls.get(path)
    if call is None:
        return False
    given = {a.index for a in call.args if isinstance(a, Op)}
    returned = call.result if isinstance(call.result, tuple) else (call.result,)
    return all(_moved_from(linear_input(o), given) for o in linears) and any(
        isinstance(r, Op) and _moved_from(r, {result.index}) for r in returned
    )


def _why_not_just(flat: Flat, path: str, linears: list[Op], result: Op) -> tuple[Op, str]:
    """What `_is_just` stumbles on: the op, and a sentence about the module."""
    call = flat.first_calls.get(path)
    if call is None:
        return result, "no module holds all of it but the model itself"
    given = {a.index for a in call.args if isinstance(a, Op)}
    for linear in linears:
        stop = _not_moved(linear_input(linear), given)
        if stop is not None:
            return stop, (
                f"{op_name(stop)} stands inside the module, before the linears: "
                "it would go with them"
            )
    returned = call.result if isinstance(call.result, tuple) else (call.result,)
    ends = [r for r in returned if isinstance(r, Op)]
    stops = [s for s in (_not_moved(r, {result.index}) for r in ends) if s is not None]
    last = stops[0] if stops else result
    return (
        last,
        f"{op_name(last)} stands inside the module, after the last linear: it would go with it",
    )


def op_name(op: Op) -> str:
    """An op as people call it: `softmax`, `the input x`, `the parameter blocks.0.w`."""
    if op.kind == "input":
        return f"the input `{op.target}`"
    if op.kind == "param":
        return f"the parameter `{op.fqn}`"
    if op.kind == "module":
        return f"the module `{op.path}`"
    packet = getattr(op.target, "overloadpacket", None)
    return f"`{(packet or op.target).__name__}`"


def _moved_from(op: Op, goals: set[int]) -> bool:
    """Whether `op` is one of the goals, or one of them moved."""
    return _not_moved(op, goals) is None


def _not_moved(op: Op, goals: set[int]) -> Op | None:
    """The op on the way back to the goals that is no movement, None where there is none."""
    while op.index not in goals:
        if op.kind != "op" or not (op.target in MOVEMENTS or op.target is operator.getitem):
            return op
        if not isinstance(op.args[0], Op):
            return op
        op = op.args[0]
    return None


def _multiplied(query: Op, linears: tuple[Op, ...]) -> bool:
    """Whether q is multiplied by a table on its way from its linear: rotary positions."""
    inside = {o.index for o in linears}
    reaches: dict[int, bool] = {}

    def from_linear(op: Op) -> bool:
        if op.index not in reaches:
            reaches[op.index] = op.index in inside or (
                op.kind == "op"
                and op.index > min(inside)
                and any(from_linear(o) for o in op.operands)
            )
        return reaches[op.index]

    def multiplied(op: Op) -> bool:
        if op.index in inside or not from_linear(op):
            return False
        factors = op.args[:2] if op.target is ATEN.mul.Tensor else ()
        if all(isinstance(a, Op) for a in factors) and any(
            not from_linear(a) and not _is_param(a) for a in factors
        ):
            return True
        return any(multiplied(o) for o in op.operands)

    return multiplied(query)


def _is_param(op: Op) -> bool:
    while op.kind == "op" and op.target in MOVEMENTS:
        op = op.operands[0]
    return op.kind == "param"


def _next_linear(op: Op) -> Op | None:
    """The linear that takes an op's result through movements alone."""
    current = op
    for _ in range(12):
        linears = [u for u in current.users if is_linear(u) and linear_input(u) is current]
        if linears:
            return linears[0]
        movements = [u for u in current.users if u.kind == "op" and u.target in MOVEMENTS]
        if len(movements) != 1:
            return None
        current = movements[0]
    return None


def _forward(op: Op, depth: int) -> list[Op]:
    """Ops after `op` up to `depth` steps, nearest first."""
    found: list[Op] = []
    level = [op]
    for _ in range(depth):
        level = list(dict.fromkeys(u for o in level for u in o.users))
        found += level
    return found


def mlps(flat: Flat, attention_paths: set[str], refused: Refused | None = None) -> list[Mlp]:
    """Every MLP on a token stream (three or more dimensions), in execution order; near ones go to `refused`."""
    found: list[Mlp] = []
    refused = [] if refused is None else refused
    for op in flat.ops:
        if (
            op.kind != "op"
            or op.target not in ACTIVATIONS
            or op.tensor is None
            or op.tensor.ndim < 3
        ):
            continue
        mlp = _mlp_around(flat, op)
        if isinstance(mlp, Refusal):
            refused.append(mlp)
            continue
        inner = next(
            (p for p in attention_paths if p.startswith(mlp.path + ".") or p == mlp.path), None
        )
        if not mlp.path or inner is not None:
            # the deepest module that holds it holds an attention too: no module of its own
            why = f"it holds an attention too, {inner}" if inner else "no module holds it"
            refused.append(Refusal("mlp", mlp.path, op, op, why))
            continue
        if mlp.path not in {m.path for m in found}:
            found.append(mlp)
    return found


def _mlp_around(flat: Flat, activation: Op) -> Mlp | Refusal:
    def refusal(op: Op, reason: str, path: str = "") -> Refusal:
        return Refusal("mlp", path or flat.called(activation.path), activation, op, reason)

    name = op_name(activation)
    before = _through(activation.args[0], back=True)
    if before is None or not is_linear(before):
        read = "no tensor" if before is None else op_name(before)
        return refusal(before or activation, f"its {name} reads {read}, not a linear")
    gate: Op | None = None
    after: Op = activation
    for user in activation.users:  # gated: the activation times another linear's result
        if user.target is ATEN.mul.Tensor:
            others = [a for a in user.args[:2] if isinstance(a, Op) and a is not activation]
            other = _through(others[0], back=True) if others else None
            if other is not None and is_linear(other):
                gate, before, after = before, other, user
    down = _next_linear(after)
    if down is None:
        return refusal(after, f"no linear reads the result of its {op_name(after)}")
    width, back = _features(linear_input(before)), _features(down)
    path = flat.called(common_path([o for o in (before, gate, down, activation) if o is not None]))
    firsts = [before] if gate is None else [before, gate]
    if width != back:
        return refusal(down, f"it reads {width} features and gives {back}", path)
    if not _is_just(flat, path, firsts, down):
        return refusal(*_why_not_just(flat, path, firsts, down), path)
    name = ACTIVATIONS[activation.target]
    if name == "gelu" and activation.kwargs.get("approximate") == "tanh":
        name = "gelu_tanh"
    return Mlp(path, before, gate, down, activation, name)


def _through(op: Any, *, back: bool) -> Op | None:
    """Walk back over movements (a chunk of a fused linear)."""
    while (
        isinstance(op, Op)
        and op.kind == "op"
        and (op.target in MOVEMENTS or op.target is operator.getitem)
    ):
        op = op.args[0]
    return op if isinstance(op, Op) else None


def _features(op: Op) -> int:
    return size_hint(op.tensor.shape[-1]) if op.tensor is not None else -1
