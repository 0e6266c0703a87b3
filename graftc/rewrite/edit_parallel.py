"""`replace with parallel(…)`: branches that read one input, and how their outputs become one."""

from __future__ import annotations

from dataclasses import replace

from graftc.diagnostics import fail
from graftc.language.rules import BranchPart, BranchSite, CopyOf, OperatorCall, Parallel
from graftc.operators.spec import OperatorSpec, Value
from graftc.operators.specs import MERGES
from graftc.program.analysis import Site
from graftc.rewrite.block_parts import inner_site
from graftc.rewrite.edit_insert import copy_module
from graftc.rewrite.edit_together import together_edit
from graftc.rewrite.edits import Edit, NewModule, Place, new_module


def parallel_edit(place: Place, edit: Parallel) -> Edit:
    """The edit at a match. Raises GraftError where the branches cannot be merged."""
    sites = _sites(place, edit)
    _check_alike(edit, sites)
    of_blocks, several = sites[0].role == "block", len(sites) > 1
    if several and not of_blocks:
        return together_edit(place, edit, sites)
    if edit.options.get("norm"):
        fail(
            "G453",
            "`norm = first` is for sites that each have a norm before them",
            span=edit.span,
            site=sites[0].path,
            wanted="two sites of one block, such as parallel(b.attention, b.mlp, …)",
            help="leave out `norm = first`",
        )
    new: list[NewModule] = []
    branches: list[str] = []
    for branch in edit.branches:
        if isinstance(branch, (BranchSite, BranchPart)):
            branches.append(_site(place, branch).path)
            continue
        if isinstance(branch, CopyOf):
            source = place.match.bindings[branch.binding]
            _check_copied(edit, source, of_blocks, sites)
            new.append(copy_module(place, branch, place.fresh(source.path)))
        else:
            new.append(new_module(place, branch, sites[0], place.fresh(sites[0].path)))
        branches.append(new[-1].path)
    new.append(_merge_module(MERGES[edit.merge], place, edit, sites, len(branches), of_blocks))
    return Edit(
        "parallel",
        place.rule,
        place.match,
        sites,
        sites[0].graph,
        tuple(new),
        tuple(branches),
        edit.merge,
        of_blocks,
        dict(edit.options),
    )


def _site(place: Place, branch: BranchSite | BranchPart) -> Site:
    site = place.match.bindings[branch.binding]
    if isinstance(branch, BranchPart):
        return inner_site(place.analysis, site, branch.part, branch.span)
    return site


def _sites(place: Place, edit: Parallel) -> tuple[Site, ...]:
    """The branches that the model already has, in data-flow order."""
    order = {s.path: i for i, s in enumerate(place.analysis.sites)}
    sites = [_site(place, b) for b in edit.branches if isinstance(b, (BranchSite, BranchPart))]
    if len(sites) == 0:
        fail("G357", "`parallel` has no matched site among its branches", span=edit.span)
    # Sites of one block run in this order, whatever the order in which the rule names them.
    return tuple(sorted(sites, key=lambda s: 0 if s.role == "block" else order[s.path]))


def _check_alike(edit: Parallel, sites: tuple[Site, ...]) -> None:
    of_blocks = all(s.role == "block" for s in sites)
    if not of_blocks and any(s.role == "block" for s in sites):
        fail(
            "G357",
            "blocks and sites inside blocks cannot be merged: a block's output holds the residual stream",
            span=edit.span,
            found=", ".join(f"{s.path} ({s.role})" for s in sites),
        )
    if len({s.graph for s in sites}) != 1:
        fail(
            "G357",
            "the branches are not called by one graph",
            span=edit.span,
            found=", ".join(s.path for s in sites),
        )
    if of_blocks and any(isinstance(b, OperatorCall) for b in edit.branches):
        fail(
            "G357",
            "an operator and a block cannot be merged: a block's output holds the residual stream",
            span=edit.span,
            site=sites[0].path,
            help="match the attention inside the block, and put the operator beside it",
        )


def _check_copied(edit: Parallel, source: Site, of_blocks: bool, sites: tuple[Site, ...]) -> None:
    if not of_blocks or source.graph != sites[0].graph:
        fail(
            "G357",
            f"a copy of {source.path} is no branch beside {sites[0].path}",
            span=edit.span,
            site=sites[0].path,
            wanted="blocks that one graph calls",
        )


def _merge_module(
    spec: OperatorSpec,
    place: Place,
    edit: Parallel,
    sites: tuple[Site, ...],
    count: int,
    of_blocks: bool,
) -> NewModule:
    """`blocks_merge.3` for the fourth group of blocks; `attn_merge` beside a site."""
    if spec.name == "lerp" and count != 2:
        fail(
            "G357",
            "`merge = lerp` takes two branches",
            span=edit.span,
            wanted="2",
            found=str(count),
        )
    container, _, last = sites[0].path.rpartition(".")
    path = (
        f"{container}_merge.{place.index}"
        if of_blocks and container and last.isdigit()
        else f"{sites[0].path}_merge"
    )
    if path in place.taken:  # another rule merges blocks of the same container
        stem, n = path.rpartition(".")[0] if of_blocks else path, 0
        while path in place.taken:
            n += 1
            path = f"{stem}.{n}" if of_blocks and last.isdigit() else f"{stem}{n}"
    place.taken.add(path)
    if spec.name == "sum" and of_blocks:  # a block's output holds its input: x + Σ (rᵢ − x)
        spec = replace(spec, module="graftc.operators.parallel:BlockSumMerge")
    given: dict[str, Value] = {"dim": sites[0].facts.get("dim"), "branches": count, **edit.options}
    arguments = {a.name: given.get(a.name, a.default) for a in spec.args}
    return NewModule(path, spec, arguments, "block" if of_blocks else "site", sites[0])  # type: ignore[arg-type]
