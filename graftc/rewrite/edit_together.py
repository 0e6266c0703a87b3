"""`parallel(b.attention, b.mlp, merge = sum, norm = first)`: sites in a row read one input.

Each of them adds its output to the residual stream already, so that the sum of the branches needs no
new module: the second's call reads what the first's reads, and its own norm goes away.
"""

from __future__ import annotations

import operator
from typing import NoReturn

from torch import fx

from graftc.diagnostics import fail
from graftc.language.rules import OperatorCall, Parallel
from graftc.program.analysis import Analysis, Site
from graftc.program.flat import Op
from graftc.program.parts import PartRef, part_refs
from graftc.program.program import ATEN, join, shape_hint
from graftc.program.roles import LINEARS
from graftc.rewrite.edits import Edit, Fold, Place
from graftc.rewrite.norms import affine_tail, same_norm

_FIRST_LINEARS = ("q", "k", "v", "up", "gate")


def together_edit(place: Place, edit: Parallel, sites: tuple[Site, ...]) -> Edit:
    """The edit of two sites of one block. Raises GraftError where the block's form does not allow it."""
    if len(sites) != 2 or any(not hasattr(b, "binding") for b in edit.branches):
        extra = next((b for b in edit.branches if isinstance(b, OperatorCall)), None)
        fail(
            "G453",
            "two sites of a block run in parallel, with nothing beside them",
            span=extra.span if extra else edit.span,
            site=sites[0].path,
            wanted="parallel(b.attention, b.mlp, merge = sum)",
        )
    if edit.merge != "sum":
        fail(
            "G453",
            f"`merge = {edit.merge}` of sites that each add to the residual stream",
            span=edit.span,
            site=sites[0].path,
            wanted="merge = sum",
            help="write `merge = sum`",
        )
    first, second = sites
    program = place.analysis.program
    graph = program.module(first.graph)
    assert isinstance(graph, fx.GraphModule)
    nodes = {n.name: n for n in graph.graph.nodes}
    read_first = nodes[first.node].args[first.stream]
    read_second = nodes[second.node].args[second.stream]
    fold = None
    if edit.options.get("norm"):
        fold = _fold(place.analysis, graph, edit, sites, read_first, read_second)
    _check_residual(edit, nodes[first.node], read_first, read_second, sites)
    region = place.analysis.by_path.get(first.graph) if first.graph else None
    if region is None and place.rule.distill is not None:
        fail(
            "G453",
            f"{first.path} and {second.path} stand in no block that could be distilled",
            span=edit.span,
            help="leave out `distill`",
        )
    return Edit(
        "together",
        place.rule,
        place.match,
        sites,
        first.graph,
        branches=(first.path, second.path),
        merge="sum",
        options=dict(edit.options),
        fold=fold,
        region=region,
    )


def _check_residual(
    edit: Parallel, call: fx.Node, before: object, after: object, sites: tuple[Site, ...]
) -> None:
    """The second reads, through its norm, x + (what the first made of x)."""
    for h in _behind(after):
        terms = list(h.all_input_nodes) if h.target is ATEN.add.Tensor else []
        made = [t for t in terms if _comes_from(t, call)]
        if made and any(t is n for t in terms if t not in made for n in _behind(before)):
            return
    fail(
        "G453",
        f"{sites[1].path} does not read {sites[0].path} added to the residual stream",
        span=edit.span,
        site=sites[1].path,
        wanted="x + a(norm(x)), and then a norm and the second site",
        found=str(after),
    )


def _behind(node: object, most: int = 12) -> list[fx.Node]:
    """A value, and what it was made of in the same shape: through a norm, a modulation."""
    found: list[fx.Node] = []
    waiting = [node] if isinstance(node, fx.Node) else []
    while waiting and len(found) < most:
        at = waiting.pop(0)
        if at not in found:
            found.append(at)
            made = at.all_input_nodes
            if at.target is operator.getitem:  # one of a module's several results
                made = made[0].all_input_nodes
            waiting += [a for a in made if shape_hint(a) == shape_hint(at)]
    return found


def _comes_from(node: fx.Node, call: fx.Node) -> bool:
    """Whether `node` is the call's result, perhaps after a gate."""
    for _ in range(8):
        if node is call:
            return True
        nexts = [a for a in node.all_input_nodes if shape_hint(a) == shape_hint(node)]
        if len(nexts) != 1:
            return any(a is call for a in nexts)
        node = nexts[0]
    return False


def _fold(
    analysis: Analysis,
    graph: fx.GraphModule,
    edit: Parallel,
    sites: tuple[Site, ...],
    read_first: object,
    read_second: object,
) -> Fold:
    """The second norm's scale and shift, to be moved into the second site's first linears."""
    names: list[tuple[str | None, str | None]] = []
    modules: list[fx.GraphModule] = []
    for site, node in zip(sites, (read_first, read_second), strict=True):
        if not isinstance(node, fx.Node) or node.op != "call_module":
            _adaptive(edit, site, node)
        module = graph.get_submodule(str(node.target))
        tail = affine_tail(module)
        if tail is None or len(node.args) != 1:
            _adaptive(edit, site, node)
        path = join(site.graph, str(node.target))
        names.append(tuple(join(path, n) if n else None for n in tail))  # type: ignore[arg-type]
        assert isinstance(module, fx.GraphModule)
        modules.append(module)
    if not same_norm(*modules):
        fail(
            "G454",
            f"the norms before {sites[0].path} and {sites[1].path} differ in more than scale and shift",
            span=edit.span,
            site=sites[1].path,
            wanted="norms of one kind, with one epsilon",
        )
    return Fold(names[0], names[1], _linears(analysis, edit, sites[1]))


def _adaptive(edit: Parallel, site: Site, node: object) -> NoReturn:
    fail(
        "G454",
        f"{site.path} does not read a norm with a fixed scale and shift",
        span=edit.span,
        site=site.path,
        wanted="a norm whose scale and shift are parameters",
        found=f"`{node}`, an adaptive norm or none",
        help="leave out `norm = first`: both then read the first one's input as it is",
    )


def _linears(
    analysis: Analysis, edit: Parallel, site: Site
) -> tuple[tuple[str, str | None, bool], ...]:
    """The linears that read the site's input. Raises GraftError where something else reads it too."""
    refs = part_refs(analysis, site.path)
    found = {
        r.weight: (r.weight, r.bias, r.transposed)
        for n in _FIRST_LINEARS
        if isinstance(r := refs.get(n), PartRef) and r.computed is None
    }
    given = analysis.flat.first_calls[site.path].args[site.stream]
    assert isinstance(given, Op)
    inside = [u for u in given.users if u.path == site.path or u.path.startswith(site.path + ".")]
    for user in inside:
        weights = [o.fqn for o in user.operands if o.kind == "param"]
        if user.target is ATEN.sym_size.int:
            continue
        if user.target not in LINEARS or not set(weights) & set(found):
            fail(
                "G454",
                f"`{user.node.name}` at {user.path} reads the input of {site.path} and is no linear of it",
                span=edit.span,
                site=site.path,
                wanted="the site's first linears alone",
            )
    return tuple(found.values())
