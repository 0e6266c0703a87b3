"""Give an attention or an MLP that has no module of its own one: a pass from Program to Program.

Some blocks write their attention with einsum in their own forward, some put the second half of an MLP
together with the residual and the norm. The ops between the first linears and the last one are moved into
a new module beside their siblings, called by the role; a module that holds only a part of them is inlined
first. Values do not change; parameters keep their names below the new module (`Program.moved` maps them back).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from graftc.program import sizes
from graftc.program.evaluate import data_operands
from graftc.program.flat import Flat, Op, common_path, flatten
from graftc.program.ops import MOVEMENTS
from graftc.program.program import ATEN, Program, generate_code, join
from graftc.program.refusals import not_moved
from graftc.program.regions import Nodes, inline_call, outline_nodes
from graftc.program.roles import Attention, attentions, linear_input, mlps


@dataclass(frozen=True, eq=False)
class Region:
    """Ops to be one module: its name, the linears it begins with, the ops it ends with."""

    name: str
    firsts: tuple[Op, ...]
    lasts: tuple[Op, ...]


def outline(program: Program) -> Program:
    """A Program in which every attention and every MLP that was found is a module (consumes its argument)."""
    flat = flatten(program)
    regions = _regions(flat)
    if not regions:
        return program
    forward = Nodes()
    moved: dict[str, str] = dict(program.moved)
    classes = dict(program.classes)
    touched = False
    done: set[frozenset[fx.Node]] = set()
    for region in regions:
        ops = _ops_of(region)
        key = frozenset(o.node for o in ops)
        if key in done:  # a block that runs several times
            continue
        done.add(key)
        names = _outline(program.root, flat, region, ops, forward)
        if names is not None:
            touched = True
            _rename(moved, classes, names)
    if not touched:
        return program
    sizes.unthread(program.root)
    for _, module in program.graphs():
        module.graph.lint()
        generate_code(module)
    return replace(program, moved=moved, classes=classes)


def _regions(flat: Flat) -> list[Region]:
    found: list[Region] = []
    for a in attentions(flat):
        if a.path and a.complete and not _makes_its_mask(flat, a):
            continue
        firsts = tuple(dict.fromkeys([*a.q, *a.k, *a.v]))
        lasts = a.outs or (_last_movement(a.result),)
        found.append(Region(a.kind, firsts, lasts))
    for m in mlps(flat):
        if not m.path:
            firsts = tuple(o for o in (m.up, m.gate) if o is not None)
            found.append(Region("mlp", tuple(dict.fromkeys(firsts)), (m.down,)))
    return found


def _makes_its_mask(flat: Flat, a: Attention) -> bool:
    """Whether the module computes the attention's one mask from inputs of its own: as an input it can be taken over."""
    if len(a.masks) != 1 or a.masks[0].form == "hidden":
        return False
    mask = a.masks[0].mask
    given = {o.index for o in flat.first_calls[a.path].args if isinstance(o, Op)}
    own = not_moved(mask, given)
    return own is not None and own.kind == "op" and bool(_reached(own, given))


def _reached(op: Op, goals: set[int]) -> set[int]:
    """The goals whose values are in `op`."""
    found: set[int] = set()
    stack, seen = [op], set[int]()
    while stack:
        current = stack.pop()
        if current.index in goals:
            found.add(current.index)
        elif current.index not in seen:
            seen.add(current.index)
            stack += data_operands(current)
    return found


def _last_movement(op: Op) -> Op:
    """Where an attention without an output projection ends: after its heads are put together."""
    while len(op.users) == 1 and op.users[0].target in MOVEMENTS and op.users[0].args[0] is op:
        op = op.users[0]
    return op


def _ops_of(region: Region) -> list[Op]:
    """The ops on a way from the first linears to the last, with the parameters and sizes that only they use.

    The layout ops around a linear that is stored transposed (`view`, `addmm`, `view`) go with it.
    """
    firsts = [o for first in region.firsts for o in (first, *_flattening(first))]
    lasts = [_unflattening(o) for o in region.lasts]
    begin = min(o.index for o in firsts)
    starts = {o.index for o in firsts}
    memo: dict[int, bool] = {}

    def inside(op: Op) -> bool:
        if op.index not in memo:
            memo[op.index] = op.index in starts or (
                op.kind == "op" and op.index > begin and any(inside(o) for o in data_operands(op))
            )
        return memo[op.index]

    found: dict[int, Op] = {o.index: o for o in firsts}
    stack = list(lasts)
    seen: set[int] = set()
    while stack:
        op = stack.pop()
        if op.index not in seen and inside(op):
            seen.add(op.index)
            found[op.index] = op
            stack += data_operands(op)
    _add_own(found)
    return [found[i] for i in sorted(found)]


def _flattening(first: Op) -> list[Op]:
    source = linear_input(first)
    flat = first.target is ATEN.addmm.default and source.kind == "op" and source.path == first.path
    return [source] if flat and source.target in MOVEMENTS else []


def _unflattening(last: Op) -> Op:
    """The op that gives a linear's rows their batch and tokens again, where the linear had them as one."""
    users = [u for u in last.users if u.path == last.path and u.target in MOVEMENTS]
    rows = last.tensor is not None and last.tensor.ndim == 2
    return users[0] if rows and len(users) == len(last.users) == 1 else last


def _add_own(found: dict[int, Op]) -> None:
    """Parameters, sizes and constants that nothing else uses."""
    stack = [o for op in found.values() for o in op.operands]
    while stack:
        op = stack.pop()
        if op.index in found or not all(u.index in found for u in op.users):
            continue
        val = op.node.meta.get("val")
        size = isinstance(val, (int, torch.SymInt)) or op.target is getattr
        if op.kind == "param" or (op.kind == "op" and (size or not data_operands(op))):
            found[op.index] = op
            stack += op.operands


def _outline(
    root: fx.GraphModule, flat: Flat, region: Region, ops: list[Op], forward: Nodes
) -> Mapping[str, str] | None:
    """Move a region into a new module; new path → old path of what moved, None where it cannot be one."""
    path = flat.called(common_path([o for o in ops if o.kind == "op"]))
    ours = {o.index for o in ops}
    graph_module = root.get_submodule(path)
    assert isinstance(graph_module, fx.GraphModule)
    callers = {c.path: c for c in reversed(flat.calls)}
    whole = _whole_calls(flat, path, ops, ours)
    nodes: list[fx.Node] = []
    for op in ops:
        node, where = op.node, op.path
        chain = [node]
        while where != path and where in callers:
            call = callers[where]
            node, where = call.node, call.graph
            chain.append(node)
        if where != path:
            return None
        nodes.append(_surface(graph_module, chain, whole, forward))
    inputs_first = [forward[o.node] for o in region.firsts]
    names = outline_nodes(
        graph_module, list(dict.fromkeys(nodes)), region.name, inputs_first, forward
    )
    if names is None:
        return None
    return {join(path, new): join(path, old) for new, old in names.items()}


def _whole_calls(flat: Flat, path: str, ops: list[Op], ours: set[int]) -> set[fx.Node]:
    """The calls below `path` whose every op is in the region."""
    paths = {o.path for o in ops}
    candidates = {
        p[:i] for p in paths for i in range(len(path) + 1, len(p) + 1) if i == len(p) or p[i] == "."
    }
    partial = {
        c
        for o in flat.ops[min(ours) : max(ours) + 1]
        if o.kind != "param" and o.index not in ours
        for c in _prefixes(o.path)
        if c in candidates
    }
    begin, end = min(ours), max(ours)
    outside = {
        c
        for o in _neighbours(flat, begin, end, candidates)
        if o.index not in ours and o.kind != "param"
        for c in _prefixes(o.path)
        if c in candidates
    }
    left = candidates - partial - outside
    return {c.node for c in flat.calls if c.path in left}


def _neighbours(flat: Flat, begin: int, end: int, candidates: set[str]) -> Iterable[Op]:
    """Ops of the candidate modules that run just before or just after the region."""
    for step, start in ((-1, begin - 1), (1, end + 1)):
        i = start
        while 0 <= i < len(flat.ops):
            op = flat.ops[i]
            if not any(c in candidates for c in _prefixes(op.path)):
                break
            yield op
            i += step


def _prefixes(path: str) -> Iterable[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _surface(
    graph_module: fx.GraphModule, chain: list[fx.Node], whole: set[fx.Node], forward: Nodes
) -> fx.Node:
    """The node in the outer graph that stands for the innermost of `chain`, modules inlined that are not whole."""
    for node in chain[:0:-1]:
        current = forward[node]
        if current in forward.inlined:
            continue
        if forward.origin(current) in whole:
            return current
        inline_call(graph_module, current, forward)
    return forward[chain[0]]


def _rename(moved: dict[str, str], classes: dict[str, str], names: Mapping[str, str]) -> None:
    """Record where moved modules and parameters came from, and give them their class under the new path."""
    for new, old in names.items():
        moved[new] = next(
            (moved[k] + old[len(k) :] for k in moved if old == k or old.startswith(k + ".")), old
        )
        for path in [p for p in classes if p == old or p.startswith(old + ".")]:
            classes[new + path[len(old) :]] = classes[path]


def original_name(program: Program, name: str) -> str:
    """A parameter's name in the model that was captured."""
    prefix = name
    while prefix:
        if prefix in program.moved:
            return program.moved[prefix] + name[len(prefix) :]
        prefix = prefix.rpartition(".")[0]
    return name
