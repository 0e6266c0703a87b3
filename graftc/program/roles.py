"""Which module is an attention, which an MLP: told from dataflow, never from names.

The anchors are ops: `scaled_dot_product_attention`, a softmax between two products, a product of
products (linear attention), an opaque op on three like tensors; a nonlinearity between two linears.
From an anchor we walk to the linears around it; the deepest module that holds them all, and nothing
else, is the site. Where q, k and v come from tells self-, cross- and joint attention apart.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from graftc.program.activations import activation_of, pointwise_source
from graftc.program.evaluate import Parameters
from graftc.program.flat import Flat, Op, backward, common_path, strip
from graftc.program.masks import Masking, Reading, form_of, maskings, read
from graftc.program.ops import (
    ACTIVATIONS,
    LINEARS,
    MOVEMENTS,
    NORM_PARTS,
    NORMS,
    POINTWISE,
    PRODUCTS,
    SDPA,
    SOFTMAX,
)
from graftc.program.program import ATEN, size_hint
from graftc.program.qk import Route, factor_of, route
from graftc.program.refusals import (
    Refusal,
    Refused,
    near_mlp,
    not_moved,
    op_name,
    why_not_just,
)
from graftc.program.rotary import is_rotary
from graftc.program.scores import is_bounded, softcap_of

Form = Literal["softmax", "linear", "opaque"]


@dataclass(frozen=True, eq=False)
class Anchor:
    """An attention's ops before we know where it stands: its operands, its result, its masks.

    `bounded`: its scores go through a tanh; `softcap` is the cap, where it is one.
    """

    op: Op
    result: Op
    query: Op
    key: Op
    value: Op
    form: Form
    masks: tuple[Masking, ...] = ()
    causal: bool = False
    scale: float | None = None
    bounded: bool = False
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention found: its site, its kind, the ops around the anchor.

    `path` is the module that is the attention and nothing else, '' where there is none. `outs`: the output
    projections, one for each stream; `complete` says whether they are inside the site. `form`: 'softmax',
    'linear' (a product of products, no softmax) or 'opaque' (an op that graftc cannot see into). `masks` are
    those that do something else than hide the future, `reading` what all of them do together. `q_routes`: how each
    of `q` becomes the query. `scale`: what the products of the linears' results are multiplied by, in all.
    `bounded`: the scores go through a tanh, and `softcap` is its cap, None where it is not one of that form.
    """

    path: str
    kind: str
    anchor: Op
    result: Op
    query: Op
    key: Op
    value: Op
    q: tuple[Op, ...]
    k: tuple[Op, ...]
    v: tuple[Op, ...]
    outs: tuple[Op, ...]
    complete: bool
    masks: tuple[Masking, ...]
    reading: Reading
    rotary: bool
    normed: bool
    form: Form
    q_routes: tuple[Route, ...]
    k_routes: tuple[Route, ...]
    scale: float
    bounded: bool
    softcap: float | None

    @property
    def out(self) -> Op | None:
        """The output projection, where it is one and inside the site."""
        return self.outs[0] if self.complete and len(self.outs) == 1 else None

    @property
    def causal(self) -> bool:
        return self.reading.causal

    @property
    def mask(self) -> Op | None:
        """The first mask that does something else than hide the future."""
        return self.masks[0].mask if self.masks else None


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP found: the module that is its site ('' for none), its linears and its activation.

    `activation` is the op with the activated value, `name` the activation's.
    """

    path: str
    up: Op
    gate: Op | None
    down: Op
    activation: Op
    name: str


def is_linear(op: Op) -> bool:
    return op.kind == "op" and op.target in LINEARS


def linear_input(op: Op) -> Op:
    return op.args[1] if op.target is ATEN.addmm.default else op.args[0]


def attentions(
    flat: Flat, refused: Refused | None = None, parameters: Parameters | None = None
) -> list[Attention]:
    """Every attention of a model, in execution order; what nearly was one goes to `refused`.

    `parameters`: values of buffers by name, where there are any: a mask may be made of them.
    """
    memo: dict[int, Reading] = {}
    refused = [] if refused is None else refused
    found = (_around(flat, a, refused, parameters, memo) for a in _anchors(flat, refused))
    return [a for a in found if a is not None]


def _anchors(flat: Flat, refused: Refused) -> Iterator[Anchor]:
    for op in flat.ops:
        if op.kind != "op":
            continue
        anchor = None
        if op.target is SDPA:
            q, k, v = op.args[:3]
            mask = op.argument(3, "attn_mask")
            masks = (Masking(mask, form_of(mask)),) if isinstance(mask, Op) else ()
            causal = bool(op.argument(5, "is_causal", False))
            scale = op.argument(6, "scale")
            scale = float(scale) if isinstance(scale, (int, float)) else None
            anchor = Anchor(op, op, q, k, v, "softmax", masks, causal, scale)
        elif op.target in SOFTMAX:
            anchor = _written_out(flat, refused, op)
        elif op.target in PRODUCTS:
            anchor = _product_of_products(op)
        elif getattr(op.target, "namespace", "aten") not in ("aten", "prims", "prim"):
            anchor = _opaque(op)
        if anchor is not None:
            yield anchor


def _written_out(flat: Flat, refused: Refused, softmax: Op) -> Anchor | None:
    """softmax between two products."""
    scores = backward(softmax, lambda o: o.kind == "op" and o.target in PRODUCTS)
    outs = [o for o in _forward(softmax, 4) if o.target in PRODUCTS]
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
    way = _between(softmax, {score.index})
    masks = maskings(way, score)
    if offset:
        masks = (Masking(score.args[0], "additive"), *masks)
    scale = float(score.argument(4, "alpha", 1)) if offset else 1.0
    for op in way:
        factor = factor_of(op)
        scale *= factor[0] if factor is not None else 1.0
    q, k = score.args[offset : offset + 2]
    return Anchor(
        softmax,
        out,
        q,
        k,
        out.args[1],
        "softmax",
        masks,
        scale=scale,
        bounded=is_bounded(way),
        softcap=softcap_of(softmax, score, way),
    )


def _product_of_products(outer: Op) -> Anchor | None:
    """(v kᵀ) q or q (kᵀ v), with no softmax between: linear attention."""
    for position in (0, 1):
        inner = _single_product(outer.args[position])
        if inner is None:
            continue
        other = outer.args[1 - position]
        pair = inner.args[:2]
        # v comes as it is, k through its feature map; where both are alike, from the order of the product.
        plain = [a for a in pair if not _featured(a)]
        value = plain[0] if len(plain) == 1 else pair[0 if position == 0 else 1]
        key = pair[1] if value is pair[0] else pair[0]
        return Anchor(outer, outer, other, key, value, "linear")
    return None


def _single_product(op: Any) -> Op | None:
    """The product that `op` is, but for movements and casts."""
    if not isinstance(op, Op):
        return None
    op = strip(op)
    return op if op.kind == "op" and op.target in PRODUCTS else None


def _featured(op: Op) -> bool:
    """Whether a pointwise function was applied on the way from the linear."""
    op = strip(op)
    return op.kind == "op" and op.target in POINTWISE


def _opaque(op: Op) -> Anchor | None:
    """An op of another library on three tensors of one rank and width, with a result like the first."""
    tensors = [a for a in op.args if isinstance(a, Op) and a.tensor is not None]
    if len(tensors) < 3 or op.tensor is None or op.tensor.ndim not in (3, 4):
        return None
    q, k, v = tensors[:3]
    alike = len({t.tensor.ndim for t in (q, k, v)}) == 1 and _features(q) == _features(k)
    if not alike or list(op.tensor.shape) != list(q.tensor.shape):
        return None
    names = [a.name for a in op.target._schema.arguments]
    given = dict(zip(names, op.args, strict=False)) | op.kwargs
    causal = any("causal" in n and given[n] is True for n in given)
    masks = tuple(Masking(t, form_of(t)) for t in tensors[3:])
    return Anchor(op, op, q, k, v, "opaque", masks, causal)


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
    anchor: Anchor,
    refused: Refused,
    parameters: Parameters | None,
    memo: dict[int, Reading],
) -> Attention | None:
    q, k, v = (_linears(o) for o in (anchor.query, anchor.key, anchor.value))
    if not q or not k or not v:
        if anchor.form == "softmax":
            refused.append(_without_linears(flat, anchor, q, k))
        return None
    result = anchor.result
    if anchor.form == "linear":
        result = _normalised(result)
    outs = _linears_after(result)
    members = [anchor.op, *q, *k, *v]
    path, complete = _site(flat, members, [*q, *k, *v], outs, result)
    if not path:
        last = outs or (result,)
        held = flat.called(common_path([*members, *outs]))
        firsts = [linear_input(o) for o in (*q, *k, *v)]
        op, reason = why_not_just(flat, held, firsts, last)
        refused.append(Refusal("attention", held, anchor.op, op, reason))
    readings = [read(m, parameters, memo) for m in anchor.masks]
    reading = Reading(
        anchor.causal or any(r.causal for r in readings), any(r.other for r in readings)
    )
    q_routes = tuple(route(anchor.query, o) for o in q)
    k_routes = tuple(route(anchor.key, o) for o in k)
    scale = anchor.scale if anchor.scale is not None else _features(anchor.query) ** -0.5
    return Attention(
        path,
        _kind(q, k, v, path or common_path(members)),
        anchor.op,
        result,
        anchor.query,
        anchor.key,
        anchor.value,
        q,
        k,
        v,
        outs,
        complete,
        tuple(m for m, r in zip(anchor.masks, readings, strict=True) if r.other),
        reading,
        rotary=is_rotary(anchor.query, q),
        normed=any(
            o.target in NORMS or o.target in NORM_PARTS
            for o in _between(anchor.query, {p.index for p in q})
        ),
        form=anchor.form,
        q_routes=q_routes,
        k_routes=k_routes,
        scale=scale * q_routes[0].scale * k_routes[0].scale,
        bounded=anchor.bounded,
        softcap=anchor.softcap,
    )


def _without_linears(flat: Flat, anchor: Anchor, q: tuple[Op, ...], k: tuple[Op, ...]) -> Refusal:
    name, made = (
        ("q", anchor.query) if not q else ("k", anchor.key) if not k else ("v", anchor.value)
    )
    reason = f"its {name} comes from no linear: {op_name(made)} makes it"
    return Refusal("attention", flat.called(anchor.op.path), anchor.op, made, reason)


def _linears(op: Op) -> tuple[Op, ...]:
    return (op,) if is_linear(op) else tuple(backward(op, is_linear))


def _kind(q: tuple[Op, ...], k: tuple[Op, ...], v: tuple[Op, ...], inside: str) -> str:
    """One source is self-attention, two are cross-attention, several in each are joint attention."""
    sources = [
        {s.index for o in part for s in _streams(linear_input(o), inside)} for part in (q, k, v)
    ]
    if len(sources[0]) > 1 and sources[0] == sources[1]:
        return "joint_attention"
    reads = [{_elements(linear_input(o)) for o in part} for part in (q, k)]
    if sources[0] == sources[1] == sources[2] and reads[0] == reads[1]:
        return "self_attention"  # a pooling reads the stream with one of its tokens
    return "cross_attention"


def _elements(op: Op) -> int:
    return torch.Size(size_hint(s) for s in op.tensor.shape).numel()


def _streams(op: Op, inside: str) -> list[Op]:
    """The token streams that `op` is made of by movements and concatenation inside a module."""
    found: list[Op] = []
    stack = [op]
    while stack:
        current = strip(stack.pop())
        within = current.path == inside or current.path.startswith(inside + ".") or not inside
        if current.kind == "op" and current.target is ATEN.cat.default and within:
            stack += current.operands
        else:
            found.append(current)
    return found


def _normalised(result: Op) -> Op:
    """The result of linear attention after its normaliser: numerator / denominator, both parts of it."""
    for op in _forward(result, 8):
        if op.target is ATEN.div.Tensor and all(
            isinstance(a, Op) and any(o is result for o in [strip(a), *map(strip, a.operands)])
            for a in op.args[:2]
        ):
            return op
    return result


def _site(
    flat: Flat, members: list[Op], linears: list[Op], outs: tuple[Op, ...], result: Op
) -> tuple[str, bool]:
    """The module that is the attention and nothing else ('' for none), and whether it holds the output projection.

    BERT's `attention` also adds the residual and normalises; its `attention.self` is the site then.
    """
    if outs:
        path = flat.called(common_path([*members, *outs]))
        if _is_just(flat, path, linears, outs):
            return path, True
    path = flat.called(common_path(members))
    return (path, not outs) if _is_just(flat, path, linears, (result,)) else ("", False)


def _is_just(flat: Flat, path: str, linears: list[Op], results: tuple[Op, ...]) -> bool:
    """Whether a module's inputs reach the linears, and its outputs come from `results`, through movements alone.

    A norm before or a residual after would be lost if the module were replaced.
    """
    goals = {r.index for r in results}
    for call in flat.calls_by_path.get(path, ()):
        given = {a.index for a in call.args if isinstance(a, Op)}
        returned = call.result if isinstance(call.result, tuple) else (call.result,)
        ends = [r for r in returned if isinstance(r, Op)]
        if not ends or not all(_moved_from(r, goals) for r in ends):
            continue
        if all(_moved_from(linear_input(o), given) for o in linears):
            return True
    return False


def _moved_from(op: Op, goals: set[int]) -> bool:
    """Whether `op` is one of the goals, or made of them by movements and concatenation."""
    return not_moved(op, goals) is None


def _linears_after(op: Op) -> tuple[Op, ...]:
    """The linears that take an op's result, or a part of it, through movements alone."""
    found: list[Op] = []
    seen: set[int] = set()
    level = [op]
    for _ in range(16):
        following: list[Op] = []
        for current in level:
            for user in current.users:
                if is_linear(user) and linear_input(user) is current:
                    found.append(user)
                elif (
                    user.kind == "op"
                    and (user.target in MOVEMENTS or user.target is operator.getitem)
                    and user.index not in seen
                    and user.args
                    and user.args[0] is current
                ):
                    seen.add(user.index)
                    following.append(user)
        level = following
    return tuple(sorted(found, key=lambda o: o.index))


def _forward(op: Op, depth: int) -> list[Op]:
    """Ops after `op` up to `depth` steps, nearest first."""
    found: list[Op] = []
    level = [op]
    for _ in range(depth):
        level = list(dict.fromkeys(u for o in level for u in o.users))
        found += level
    return found


def mlps(flat: Flat, refused: Refused | None = None) -> list[Mlp]:
    """Every MLP on a token stream (three or more dimensions), in execution order; near ones go to `refused`."""
    refused = [] if refused is None else refused
    found = [m for op in flat.ops if is_linear(op) and (m := _mlp_before(flat, op)) is not None]
    ours: set[int] = set()
    for mlp in found:
        firsts = {o.index for o in (mlp.up, mlp.gate) if o is not None}
        ours |= {mlp.activation.index, *(o.index for o in _between(mlp.activation, firsts))}
        if not mlp.path:
            path = flat.called(common_path([mlp.up, mlp.down, mlp.activation]))
            inputs = [linear_input(o) for o in (mlp.up, mlp.gate) if o is not None]
            op, reason = why_not_just(flat, path, inputs, (mlp.down,))
            refused.append(Refusal("mlp", path, mlp.activation, op, reason))
    for op in flat.ops:
        known = op.kind == "op" and op.target in ACTIVATIONS and op.index not in ours
        if known and op.tensor is not None and op.tensor.ndim >= 3:
            refused.append(near_mlp(flat, op))
    return found


def _mlp_before(flat: Flat, down: Op) -> Mlp | None:
    after = strip(linear_input(down))
    if after.tensor is None or after.kind != "op":
        return None
    up, gate, activation, name = _plain_branch(after) or _gated(after) or (None, None, None, "")
    if up is None or activation is None:
        return None
    if _features(linear_input(up)) != _features(down) or not _is_stream(after, up):
        return None
    firsts = [up] if gate is None else [up, gate]
    path = flat.called(common_path([*firsts, down, activation]))
    if not _is_just(flat, path, firsts, (down,)):
        path = ""
    return Mlp(path, up, gate, down, activation, name)


def _is_stream(after: Op, up: Op) -> bool:
    """Whether an MLP works on tokens: in three dimensions, or on a stream whose tokens were put into the batch."""
    if after.tensor.ndim >= 3:
        return True
    op = linear_input(up)
    while op.kind == "op" and (op.target in MOVEMENTS or op.target in NORMS):
        source = op.args[0]
        if source.tensor is not None and source.tensor.ndim > op.tensor.ndim:
            return _features(source) == _features(op)
        op = source
    return False


def _plain_branch(after: Op) -> tuple[Op, None, Op, str] | None:
    """down(act(up(x)))."""
    activated = _activated(after)
    return (activated[0], None, after, activated[1]) if activated is not None else None


def _gated(after: Op) -> tuple[Op, Op, Op, str] | None:
    """down(act(gate(x)) · up(x))."""
    if after.target is not ATEN.mul.Tensor or not all(isinstance(a, Op) for a in after.args[:2]):
        return None
    for act, other in (after.args[:2], after.args[1::-1]):
        activated, up = _activated(act), strip(other)
        if activated is not None and is_linear(up):
            return up, activated[0], act, activated[1]
    return None


def _activated(op: Op) -> tuple[Op, str] | None:
    """(linear, activation) where `op` is an activation of a linear's result."""
    op = strip(op)
    source = pointwise_source(op) if op.kind == "op" and op.target in POINTWISE else None
    if source is None or not is_linear(strip(source)):
        return None
    name = activation_of(source, op)
    return (strip(source), name) if name is not None else None


def _features(op: Op) -> int:
    return size_hint(op.tensor.shape[-1]) if op.tensor is not None else -1
