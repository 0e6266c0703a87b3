"""Analysis: a Program's sites (which module plays which role) and chains of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from torch import fx

from graftc.program.chains import Chain, chains
from graftc.program.cost import flops_by_path, parameter_count
from graftc.program.flat import Call, Flat, Op, flatten
from graftc.program.joint import first_tokens, names_of, streams_of
from graftc.program.masks import is_every, is_whole
from graftc.program.measured import MeasuredOn, SiteMeasures
from graftc.program.ops import CONVS, LINEARS, MOVEMENTS, NORM_PARTS, NORMS
from graftc.program.program import ATEN, Program, size_hint, tensor_of
from graftc.program.qk import norm_facts
from graftc.program.refusals import Refusal
from graftc.program.roles import (
    Attention,
    Mlp,
    attentions,
    linear_input,
    mlps,
)
from graftc.program.rotary import Rotary
from graftc.program.traces import sizes_told

Fact = int | float | bool | str | None
ATTENTION_ROLES = ("self_attention", "cross_attention", "joint_attention")


@dataclass(frozen=True)
class Kept:
    """An input of a site that its replacement can take over: a context, a mask, rotary positions.

    `arguments` are positions among the site's call arguments: one for a mask or a context (the second
    token stream, form `stream`), cos and sin for rotary. `form` says what they mean. A mask is
    `additive` (added to the scores) or `boolean` (True where a token is seen), of [batch, heads,
    queries, keys] or [batch, queries, keys]; rotary is `half` (x · cos + rotate_half(x) · sin, as in
    Llama), `interleaved` (neighbouring features are a pair) or `pairs` (the same, a pair's cos being that of
    its first feature and its sin that of its second). Of cross-attention, q alone is turned.
    """

    arguments: tuple[int, ...]
    form: Literal["additive", "boolean", "half", "interleaved", "pairs", "stream"]


def _nothing_kept() -> Mapping[str, Kept]:
    return {}


@dataclass(frozen=True, eq=False)
class Site:
    """A module that plays a role.

    `graph` and `node` say which call it is; `stream` which of its arguments is the token stream;
    `block` is (chain name, index) for a site in a block, or the block itself. `facts` are what `where`
    reads (`dim`, `heads`, `tokens`, `causal`, `params`, `flops`, …); `has` what an operator would have to keep
    ('mask', 'rotary', 'causal', 'groups'). `kept`: those of mask and rotary that are whole inputs of the
    call, so that an operator can take them; what a site computes inside itself is in `has` alone.
    `measured`: what `graftc.measures` found there on data, None where nothing was measured.
    """

    path: str
    role: str
    graph: str
    node: str
    stream: int
    facts: Mapping[str, Fact]
    block: tuple[str, int] | None = None
    has: frozenset[str] = frozenset()
    class_name: str = ""
    kept: Mapping[str, Kept] = field(default_factory=_nothing_kept)
    measured: SiteMeasures | None = None


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a Program: sites in execution order, chains of blocks, FLOPs by path.

    `refused`: what looks like an attention or an MLP and has another role, with the reason.
    `measured`: what the sites' measures were made on, None where there are none.
    """

    program: Program
    flat: Flat
    sites: tuple[Site, ...]
    chains: tuple[Chain, ...]
    flops: Mapping[str, int]
    attentions: Mapping[str, Attention]
    mlps: Mapping[str, Mlp]
    refused: tuple[Refusal, ...] = ()
    measured: MeasuredOn | None = None

    def of_role(self, role: str) -> Iterator[Site]:
        """Sites of a role; `attention` is any of the three kinds."""
        wanted = ATTENTION_ROLES if role == "attention" else (role,)
        return (s for s in self.sites if s.role in wanted)

    @cached_property
    def by_path(self) -> Mapping[str, Site]:
        """A path's most telling site: a role before `unknown`."""
        return {s.path: s for s in reversed(self.sites)}

    @cached_property
    def call_counts(self) -> Counter[int]:
        """id(module) → how often a forward pass runs it, under whatever name."""
        return Counter(id(self.program.module(c.path)) for c in self.flat.calls)

    @cached_property
    def caller_counts(self) -> Counter[int]:
        """id(module) → how many calls in the graphs name it: one where it runs several times with its block."""
        nodes = {(id(self.program.module(c.path)), c.node) for c in self.flat.calls}
        return Counter(module for module, _ in nodes)

    @property
    def parameters(self) -> int:
        return parameter_count(self.program)


def analyse(program: Program) -> Analysis:
    """Find the sites and chains of a Program.

    >>> import torch
    >>> from graftc.program.capture import capture
    >>> from graftc.program.model import Model
    >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> found = analyse(capture(Model(torch.nn.Sequential(layer), {"input": torch.zeros(2, 3, 4)})))
    >>> [(s.path, s.role) for s in found.sites if s.role == "mlp"]
    [('0', 'mlp')]
    """
    with sizes_told(program.root):
        return _analyse(program)


def _analyse(program: Program) -> Analysis:
    flat = flatten(program)
    found = chains(program)
    batch = batch_size(program)
    flops = flops_by_path(flat, batch)
    calls = flat.first_calls
    attention: dict[str, Attention] = {}
    refused: list[Refusal] = []
    for a in attentions(flat, refused, lambda name: tensor_of(program, name)):
        if a.path in calls:
            attention.setdefault(a.path, a)
    blocks = {p: (c.name, i) for c in found for i, p in enumerate(c.paths)}
    streams = {p: i for c in found for p, i in zip(c.paths, c.streams, strict=True)}
    outside = {p: a for p, a in attention.items() if p not in blocks}
    mlp: dict[str, Mlp] = {}
    for m in mlps(flat, refused):
        inner = _held(m.path, outside) if m.path else None
        if inner is not None:
            why = f"it holds an attention too, {inner}"
            refused.append(Refusal("mlp", m.path, m.activation, m.activation, why))
        elif m.path in calls and m.path not in blocks:
            mlp.setdefault(m.path, m)

    def block_of(path: str) -> tuple[str, int] | None:
        while path:
            if path in blocks:
                return blocks[path]
            path = path.rpartition(".")[0]
        return None

    sites: list[Site] = []
    for call in sorted(_of_distinct_modules(program, calls), key=_order):
        role, stream, facts, has = "unknown", 0, {}, frozenset[str]()
        kept: Mapping[str, Kept] = {}
        if call.path in blocks:
            role, stream = "block", streams[call.path]
        elif call.path in outside:
            a = outside[call.path]
            role, stream = a.kind, _argument_index(call, [linear_input(o) for o in a.q])
            facts, has = _attention_facts(a, batch)
            facts |= _order_facts(a, call.args[stream] if stream < len(call.args) else None)
            kept = _kept(a, call)
            if a.kind == "joint_attention":
                stream, facts, kept = _joint(a, call, program, stream, facts, kept)
        elif call.path in mlp:
            m = mlp[call.path]
            role, stream = "mlp", _argument_index(call, [linear_input(m.up)])
            facts = _mlp_facts(m)
        else:
            role, facts = _leaf_role(call, flat)
        stream_op = call.args[stream] if stream < len(call.args) else None
        sites.append(
            Site(
                path=call.path,
                role=role,
                graph=call.graph,
                node=call.node.name,
                stream=stream,
                facts={
                    **_stream_facts(stream_op),
                    **_context_facts(kept, call),
                    **_grid_facts(stream_op, program),
                    **facts,
                    "params": parameter_count(program, call.path),
                    "flops": flops.get(call.path, 0),
                },
                block=block_of(call.path),
                has=has,
                class_name=program.classes.get(call.path, ""),
                kept=kept,
            )
        )
    return Analysis(program, flat, tuple(sites), found, flops, outside, mlp, tuple(refused))


def _of_distinct_modules(program: Program, calls: Mapping[str, Call]) -> Iterator[Call]:
    """One call of each module: what stands in the tree under several paths is one site."""
    seen: set[int] = set()
    for call in calls.values():
        module = program.module(call.path)
        if id(module) not in seen:
            seen.add(id(module))
            yield call


def _held(path: str, others: Mapping[str, Any]) -> str | None:
    """The first of `others` at or inside a path."""
    return next((p for p in others if p == path or p.startswith(path + ".")), None)


def _kept(a: Attention, call: Call) -> dict[str, Kept]:
    """The mask, the rotary tables and the context that are whole inputs of the call."""
    found: dict[str, Kept] = {}
    if len(a.masks) == 1 and a.masks[0].form != "hidden":
        index = _given(call, a.masks[0].mask)
        if index is not None and is_whole(call.args[index], a.masks[0].mask):
            found["mask"] = Kept((index,), a.masks[0].form)
    if a.kind == "cross_attention":
        places = {_given(call, linear_input(o)) for o in (*a.k, *a.v)}
        if len(places) == 1 and (index := places.pop()) is not None:
            found["context"] = Kept((index,), "stream")
    turned = {_turned(r.rotary, call) for r in a.q_routes}
    keys = {_turned(r.rotary, call) for r in a.k_routes}
    (kept, *others) = turned
    alike = keys == ({None} if a.kind == "cross_attention" else turned)
    if kept is not None and not others and alike:
        found["rotary"] = kept
    return found


def _turned(rotary: Rotary | None, call: Call) -> Kept | None:
    """The tables as arguments of the call, where these are read as they are."""
    if rotary is None:
        return None
    cos, sin = _given(call, rotary.cos), _given(call, rotary.sin)
    if cos is None or sin is None:
        return None
    step, start = (2, 1) if rotary.form == "pairs" else (1, 0)
    whole = is_every(call.args[cos], rotary.cos, 0, step)
    if not whole or not is_every(call.args[sin], rotary.sin, start, step):
        return None
    return Kept((cos, sin), rotary.form)


def _given(call: Call, op: Op) -> int | None:
    """Which argument of the call `op` is, moved or not."""
    while True:
        for i, a in enumerate(call.args):
            if a is op:
                return i
        inside = op.path == call.path or op.path.startswith(call.path + ".")
        if op.kind != "op" or not inside or op.target not in MOVEMENTS:
            return None
        if not isinstance(op.args[0], Op):
            return None
        op = op.args[0]


def _order(call: Call) -> int:
    """Outer modules first where they start together: by the first op inside or after."""
    result = call.result
    while isinstance(result, tuple) and result:
        result = result[-1]
    return result.index if isinstance(result, Op) else 0


def batch_size(program: Program) -> int:
    """The example's batch size: dimension 0 of the first input that has one."""
    first = next((p.shape[0] for p in program.inputs if p.shape), 1)
    return program.facts.dynamic[first] if isinstance(first, str) else first


def _argument_index(call: Call, sources: list[Op]) -> int:
    """Which argument of the call the sources are computed from, the nearest in dimensions first."""
    given = [a for a in call.args if isinstance(a, Op)]
    seen: set[int] = set()
    stack = list(sources)
    while stack:
        op = stack.pop()
        if op in given:
            return next(i for i, a in enumerate(call.args) if a is op)
        if op.index not in seen and (op.path == call.path or op.path.startswith(call.path + ".")):
            seen.add(op.index)
            stack.extend(op.operands)
    return 0


def _stream_facts(op: Any) -> dict[str, Fact]:
    if not isinstance(op, Op) or op.tensor is None or op.tensor.ndim < 2:
        return {}
    shape = [size_hint(s) for s in op.tensor.shape]
    facts: dict[str, Fact] = {"dim": shape[-1]}
    if len(shape) >= 3:
        facts["tokens"] = prod(shape[1:-1])
    return facts


def _joint(
    a: Attention,
    call: Call,
    program: Program,
    stream: int,
    facts: dict[str, Fact],
    kept: Mapping[str, Kept],
) -> tuple[int, dict[str, Fact], Mapping[str, Kept]]:
    """The stream that is returned first, what is known of both, and the other one as context."""
    found = streams_of(a, call)
    if isinstance(found, str):
        return stream, {**facts, "joint": found}, kept
    one, two = found
    names = names_of(found, program.facts.streams)
    first = first_tokens(a)
    swapped = first != one.tokens
    second = "shared" if one.q is two.q else "own" if two.out is not None else "hidden"
    known: dict[str, Fact] = {"both": two.out is not None, "second": second, "swapped": swapped}
    if names is not None:
        known["streams"] = ", ".join(names)
        known["first_stream"] = names[1 if swapped else 0]
    context = Kept((two.argument,), "stream")
    return one.argument, {**facts, **known}, {**kept, "context": context}


def _grid_facts(op: Any, program: Program) -> dict[str, Fact]:
    """The token grid, where the stream has a token for each place (with a second stream: or none has)."""
    grid = program.facts.grid
    if grid is None or not isinstance(op, Op) or op.tensor is None or op.tensor.ndim != 3:
        return {}
    return {"grid_height": grid[0], "grid_width": grid[1]}


def _context_facts(kept: Mapping[str, Kept], call: Call) -> dict[str, Fact]:
    """Width and tokens of the second stream, where the site has one."""
    context = kept.get("context")
    if context is None:
        return {}
    facts = _stream_facts(call.args[context.arguments[0]])
    return {f"context_{name}": value for name, value in facts.items()}


def _attention_facts(a: Attention, batch: int) -> tuple[dict[str, Fact], frozenset[str]]:
    query = [size_hint(s) for s in a.query.tensor.shape]
    head_dim = query[-1]
    out = _out_features(a.q[0])
    fused = a.q == a.k == a.v
    # [batch, heads, n, d], or [batch · heads, n, d] as nn.MultiheadAttention has it.
    heads = query[-3] if len(query) >= 4 else max(1, query[0] // batch)
    width = out // 3 if fused else out
    if a.form == "opaque":  # whatever the order of its dimensions, the last is a head's
        heads = width // head_dim
    elif a.form == "linear":  # features may stand before tokens
        heads = query[1] if len(query) >= 4 else 1
        head_dim = width // heads
    if fused:
        kv_heads = (out // head_dim - heads) // 2
    else:
        apart = a.k != a.v and a.q != a.k
        kv_heads = _out_features(a.k[0]) // head_dim if apart else heads
    facts: dict[str, Fact] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "causal": a.causal,
        "kind": a.kind.removesuffix("_attention"),
        "form": a.form,
        "out": bool(a.outs) or not a.complete,
        **norm_facts(a.q_routes, a.k_routes, head_dim, heads, kv_heads),
    }
    if abs(a.scale * head_dim**0.5 - 1) > 1e-6:
        facts["scale"] = a.scale
    if a.softcap is not None:
        facts["softcap"] = a.softcap
    if len(a.outs) == 1 and a.kind != "joint_attention":
        width = _out_features(a.outs[0])
        if width != size_hint(linear_input(a.q[0]).tensor.shape[-1]):
            facts["out_dim"] = width
    if a.kind == "cross_attention":
        facts["context_dim"] = size_hint(linear_input(a.k[0]).tensor.shape[-1])
    has = {
        name
        for name, there in [
            ("mask", a.reading.other),
            ("causal", a.causal),
            ("rotary", a.rotary),
            ("qk_norm", a.normed),
            ("groups", kv_heads != heads),
            ("softcap", a.bounded),
        ]
        if there
    }
    return facts, frozenset(has)


def _mlp_facts(m: Mlp) -> dict[str, Fact]:
    dim = size_hint(m.down.tensor.shape[-1])
    hidden = size_hint(linear_input(m.down).tensor.shape[-1])
    ratio = hidden // dim if hidden % dim == 0 else hidden / dim
    gated = m.gate is not None
    return {
        "ratio": ratio,
        "hidden": hidden,
        "activation": m.name,
        "gated": gated,
        "kind": "gated" if gated else "plain",
    }


def _order_facts(a: Attention, stream: Any) -> dict[str, Fact]:
    """Whether the stream is [tokens, batch, dim], by the sizes that its keys arrive with."""
    given = [size_hint(s) for s in linear_input(a.k[0]).tensor.shape]
    key = [size_hint(s) for s in a.key.tensor.shape]
    if len(given) != 3 or len(key) not in (3, 4) or given[0] == given[1] or a.form != "softmax":
        return {}
    first = given[1] == key[0] if len(key) == 4 else given[0] == key[1]
    if not first or given[0] != key[-2] or given[1] == key[-2]:
        return {}
    facts: dict[str, Fact] = {"tokens_first": True}
    if isinstance(stream, Op) and stream.tensor is not None:
        outside = [size_hint(s) for s in stream.tensor.shape]
        if len(outside) != 3 or outside[1] != given[1]:  # turned inside the module (`batch_first`)
            return {}
        facts["tokens"] = outside[0]
    if a.kind == "cross_attention":
        facts["context_tokens"] = given[0]
    return facts


def _out_features(op: Op) -> int:
    return size_hint(op.tensor.shape[-1])


def _leaf_role(call: Call, flat: Flat) -> tuple[str, dict[str, Fact]]:
    """norm, linear, conv, embedding: a module whose graph is that one op on its parameters."""
    graph_module = call.node.graph.owning_module
    inner = graph_module.get_submodule(str(call.node.target)) if graph_module else None
    if not isinstance(inner, fx.GraphModule):
        return "unknown", {}
    ops = [n for n in inner.graph.nodes if n.op in ("call_function", "call_module")]
    if len(ops) != 1 or ops[0].op != "call_function":
        return _written_norm(inner, ops)
    op = ops[0]
    weights = list(inner.parameters())
    if op.target in NORMS:
        eps = next((a for a in reversed(op.args) if isinstance(a, float)), op.kwargs.get("eps"))
        eps = eps if isinstance(eps, float) else 1e-5
        return "norm", {"kind": NORMS[op.target], "affine": bool(weights), "eps": eps}
    if op.target in LINEARS and weights:
        out, inside = weights[0].shape[0], weights[0].shape[-1]
        if op.target is ATEN.addmm.default:
            out, inside = inside, out
        return "linear", {"in_features": int(inside), "out_features": int(out)}
    if op.target in CONVS and weights:
        return "conv", {
            "in_features": int(weights[0].shape[1]),
            "out_features": int(weights[0].shape[0]),
        }
    if op.target is ATEN.embedding.default:
        return "embedding", {
            "in_features": int(weights[0].shape[0]),
            "out_features": int(weights[0].shape[1]),
        }
    return "unknown", {}


def _written_norm(inner: fx.GraphModule, ops: list[fx.Node]) -> tuple[str, dict[str, Fact]]:
    """A norm written out: x times the inverse root of its mean square, and nothing else."""
    weights = list(inner.parameters())
    norms = [n for n in ops if n.target in NORM_PARTS]
    if (
        len(norms) != 1
        or any(n.op == "call_module" or n.target in LINEARS or n.target in CONVS for n in ops)
        or any(w.ndim > 1 for w in weights)
    ):
        return "unknown", {}
    centred = any(n.target is ATEN.sub.Tensor for n in ops)
    sums = [n for n in ops if n.target in (ATEN.add.Tensor, ATEN.add.Scalar)]
    eps = next((a for n in sums for a in n.args if isinstance(a, float)), 0.0)
    kind = "layer_norm" if centred else "rms_norm"
    return "norm", {"kind": kind, "affine": bool(weights), "eps": eps}
