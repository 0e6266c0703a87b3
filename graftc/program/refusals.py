"""Why something that looks like an attention or an MLP is none: what `explain` says of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from graftc.program.flat import Flat, Op, strip
from graftc.program.ops import LINEARS, MOVEMENTS
from graftc.program.program import ATEN, size_hint


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


def not_moved(op: Op, goals: set[int]) -> Op | None:
    """The op on the way back to the goals that is no movement or concatenation, None where there is none."""
    while op.index not in goals:
        if op.kind == "op" and op.target is ATEN.cat.default:
            return next((s for o in op.operands if (s := not_moved(o, goals)) is not None), None)
        if op.kind != "op" or not (op.target in MOVEMENTS or op.target is operator.getitem):
            return op
        if not isinstance(op.args[0], Op):
            return op
        op = op.args[0]
    return None


def why_not_just(
    flat: Flat, path: str, firsts: Iterable[Op], results: tuple[Op, ...]
) -> tuple[Op, str]:
    """Why a module is not the attention or the MLP alone: the op it stumbles on, and a sentence on it.

    `firsts` are the inputs of its first linears, `results` its last ops.
    """
    call = flat.first_calls.get(path)
    if call is None:
        return results[0], "no module holds all of it but the model itself"
    given = {a.index for a in call.args if isinstance(a, Op)}
    for first in firsts:
        stop = not_moved(first, given)
        if stop is not None:
            return stop, (
                f"{op_name(stop)} stands inside the module, before the linears: "
                "it would go with them"
            )
    returned = call.result if isinstance(call.result, tuple) else (call.result,)
    goals = {r.index for r in results}
    stops = [s for r in returned if isinstance(r, Op) and (s := not_moved(r, goals)) is not None]
    last = stops[0] if stops else results[0]
    return (
        last,
        f"{op_name(last)} stands inside the module, after the last linear: it would go with it",
    )


def near_mlp(flat: Flat, activation: Op) -> Refusal:
    """Why an activation on a token stream is no MLP's."""

    def refusal(op: Op, reason: str) -> Refusal:
        return Refusal("mlp", flat.called(activation.path), activation, op, reason)

    name = op_name(activation)
    source = activation.args[0]
    before = strip(source) if isinstance(source, Op) else None
    if before is None or before.kind != "op" or before.target not in LINEARS:
        read = "no tensor" if before is None else op_name(before)
        return refusal(before or activation, f"its {name} reads {read}, not a linear")
    linears = [
        u for u in _moved_users(activation) if u.kind == "op" and u.target in LINEARS
    ]  # fmt: skip
    if not linears:
        return refusal(activation, f"no linear reads the result of its {name}")
    down = linears[0]
    index = 1 if before.target is ATEN.addmm.default else 0
    width = size_hint(before.args[index].tensor.shape[-1])
    back = size_hint(down.tensor.shape[-1])
    return refusal(down, f"it reads {width} features and gives {back}")


def _moved_users(op: Op) -> list[Op]:
    """The ops that read `op`, through movements and products with a gate."""
    found: list[Op] = []
    stack, seen = [op], {op.index}
    while stack:
        for user in stack.pop().users:
            if user.index in seen:
                continue
            seen.add(user.index)
            found.append(user)
            if user.target in MOVEMENTS or user.target in (operator.getitem, ATEN.mul.Tensor):
                stack.append(user)
    return found
