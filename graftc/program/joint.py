"""Joint attention: which argument is which stream, and whose tokens come first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graftc.program.flat import Call, Op, backward, strip
from graftc.program.program import ATEN, size_hint
from graftc.program.qk import Norm
from graftc.program.roles import Attention, linear_input


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream of a joint attention: its argument of the call, its linears, its tokens in the example.

    `out` is None where the site does not return it. `norms`: those of q and k, None where it has none.
    """

    argument: int
    tokens: int
    dim: int
    q: Op
    k: Op
    v: Op
    out: Op | None
    norms: tuple[Norm | None, Norm | None]


def streams_of(a: Attention, call: Call) -> tuple[Stream, Stream] | str:
    """The two streams, the one that the site returns first before the other; or why they are not told."""
    given = _linears_of(a, call)
    if isinstance(given, str):
        return given
    if len(given) != 2 or any(len(ops) != 3 for ops in given.values()):
        return "the streams have not each a linear for q, for k and for v"
    norms = {r.linear.index: r.norm for r in (*a.q_routes, *a.k_routes)}
    found: list[Stream] = []
    for index, ops in given.items():
        shape = [size_hint(s) for s in call.args[index].tensor.shape]
        if len(shape) != 3:
            return f"a stream has {len(shape)} dimensions"
        q, k, v = (next(o for o in part if o in ops) for part in (a.q, a.k, a.v))
        out = next((o for o in a.outs if size_hint(o.tensor.shape[-2]) == shape[1]), None)
        out = a.out if q in given[next(i for i in given if i != index)] else out  # one for both
        normed = norms[q.index], norms[k.index]
        found.append(Stream(index, shape[1], shape[2], q, k, v, out, normed))
    if found[0].tokens == found[1].tokens:
        return f"both streams have {found[0].tokens} tokens in the example"
    results = call.result if isinstance(call.result, tuple) else (call.result,)
    first = next((r for r in results if isinstance(r, Op)), None)
    tokens = size_hint(first.tensor.shape[-2]) if first is not None else 0
    one, two = sorted(found, key=lambda s: s.tokens != tokens)
    if one.out is None or len(results) > 2:
        return "its outputs are not one of each stream"
    return one, two


def _linears_of(a: Attention, call: Call) -> dict[int, list[Op]] | str:
    """Argument of the call → its linears of q, k and v; both have the same where they are put together first."""
    found: dict[int, list[Op]] = {}
    for op in (*a.q, *a.k, *a.v):
        source = strip(linear_input(op))
        inside = source.path == call.path or source.path.startswith(call.path + ".")
        joined = source.target is ATEN.cat.default and inside
        for stream in map(strip, source.operands) if joined else [source]:
            index = next((i for i, arg in enumerate(call.args) if arg is stream), None)
            if index is None:
                return f"{op.path} reads no input of the site's call"
            found.setdefault(index, []).append(op)
    return found


def first_tokens(a: Attention) -> int | None:
    """How many tokens the stream has that comes first where q is put together."""
    source = strip(linear_input(a.q[0]))
    if len(a.q) == 1 and source.target is ATEN.cat.default:
        return size_hint(source.operands[0].tensor.shape[-2])
    for op in _on_way(a.query, a.q):
        if op.target is ATEN.cat.default and len(op.args[0]) == 2:
            ends = [list(backward(part, lambda p: p in a.q)) or [part] for part in op.args[0]]
            if all(len(e) == 1 for e in ends) and {e[0] for e in ends} == set(a.q):
                return size_hint(ends[0][0].tensor.shape[-2])
    return None


def _on_way(end: Op, starts: tuple[Op, ...]) -> list[Op]:
    found: list[Op] = []
    stack, seen = [end], {o.index for o in starts}
    while stack:
        op = stack.pop()
        if op.index not in seen and op.index > min(o.index for o in starts):
            seen.add(op.index)
            found.append(op)
            stack += op.operands
    return found


def names_of(streams: tuple[Stream, Stream], named: Mapping[str, int]) -> tuple[str, str] | None:
    """The streams' names in their order, by their token counts; None where they are not known."""
    by_count = {count: name for name, count in named.items()}
    found = [by_count.get(s.tokens) for s in streams]
    return (found[0], found[1]) if found[0] and found[1] else None
