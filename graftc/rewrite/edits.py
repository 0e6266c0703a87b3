"""Edits as values: what a rule's match becomes, decided before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from graftc.diagnostics import fail
from graftc.language.rules import (
    BranchSite,
    OperatorCall,
    Parallel,
    Remove,
    Replace,
    Rewrite,
    Rule,
    Skip,
    Unapplied,
)
from graftc.operators.spec import OperatorSpec, Value
from graftc.operators.specs import MERGES
from graftc.program.analysis import Analysis, Site
from graftc.rewrite.arguments import check_fits, check_role, resolve_arguments
from graftc.rewrite.claims import Claim
from graftc.rewrite.inputs import kept_inputs
from graftc.rewrite.match import Match


@dataclass(frozen=True, eq=False)
class NewModule:
    """An operator to be put into the student.

    `role`: which of the spec's default inits applies. `site`: the site whose parts they speak of.
    `inputs`: parameter of its forward → which argument of the site's call it takes, beside the stream.
    """

    path: str
    spec: OperatorSpec
    arguments: Mapping[str, Value]
    role: str
    site: Site
    inputs: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit at one place.

    `kind`: 'replace', 'parallel', 'remove' or 'skip'. `sites`: what it rewires, in data-flow order.
    `graph`: the path of the graph whose calls it rewires. `new`: operators it brings.
    `branches`: for 'parallel', in order, a site's path or the path of a new module. `merge`: its merge.
    """

    kind: Literal["replace", "parallel", "remove", "skip"]
    rule: Rule
    match: Match
    sites: tuple[Site, ...]
    graph: str
    new: tuple[NewModule, ...] = ()
    branches: tuple[str, ...] = ()
    merge: str = ""
    of_blocks: bool = False
    options: Mapping[str, Value] = field(default_factory=dict[str, Value])

    @property
    def name(self) -> str:
        return "+".join(s.path for s in self.sites)

    @property
    def origin(self) -> str:
        """The place in the `.graft` file that made it."""
        return str(self.rule.edit.span)

    @property
    def claim(self) -> Claim:
        paths = tuple(s.path for s in self.sites)
        return Claim(self.rule.name, self.rule.edit.span, paths, inside=self.kind != "parallel")


def edits_of(rule: Rule, matches: tuple[Match, ...], analysis: Analysis) -> list[Edit]:
    """The edits of a rule, one for each match. Raises GraftError where the model does not allow one."""
    edits = [_edit(rule, m, i, analysis) for i, m in enumerate(matches)]
    for edit in edits:
        for site in edit.sites:
            _check_called_once(edit, site, analysis)
    return edits


def _check_called_once(edit: Edit, site: Site, analysis: Analysis) -> None:
    """A module that runs several times has one set of weights: an edit of one call would edit all."""
    calls = analysis.call_counts[id(analysis.program.module(site.path))]
    if calls > 1:
        fail(
            "G361",
            f"{site.path} is shared: it is called {calls} times",
            span=edit.rule.edit.span,
            site=site.path,
            help="edits of modules that run several times are not supported yet",
        )


def _edit(rule: Rule, match: Match, index: int, analysis: Analysis) -> Edit:
    edit = rule.edit
    if isinstance(edit, Unapplied):
        fail("G300", f"this version of graftc cannot apply {edit.what} yet", span=edit.span)
    if isinstance(edit, Replace):
        site = match.bindings[edit.binding]
        new = _new_module(edit.operator, site, match, rule, site.path)
        return Edit("replace", rule, match, (site,), site.graph, (new,))
    if isinstance(edit, Remove):
        site = match.bindings[edit.binding]
        if site.role == "block":
            fail(
                "G356",
                f"{site.path} is a block: its output holds the residual stream",
                span=edit.span,
                help=f"write `skip {edit.binding}`",
            )
        return Edit("remove", rule, match, (site,), site.graph)
    if isinstance(edit, Skip):
        site = match.bindings[edit.binding]
        if site.role != "block":
            fail(
                "G356",
                f"{site.path} is no block",
                span=edit.span,
                help=f"write `remove {edit.binding}`",
            )
        return Edit("skip", rule, match, (site,), site.graph)
    if isinstance(edit, Rewrite):
        fail("G300", "this version of graftc cannot apply `rewrite` yet", span=edit.span)
    return _parallel(rule, edit, match, index, analysis)


def _new_module(call: OperatorCall, site: Site, match: Match, rule: Rule, path: str) -> NewModule:
    call = replace(call, spec=call.spec.for_role(site.role))
    check_role(call.spec, site, call.span)
    arguments = resolve_arguments(call, site, match, rule.drop)
    check_fits(call.spec, arguments, site, call.span)
    inputs = kept_inputs(call.spec, arguments, site, rule.drop, call.span)
    return NewModule(path, call.spec, arguments, site.role, site, inputs)


def _parallel(rule: Rule, edit: Parallel, match: Match, index: int, analysis: Analysis) -> Edit:
    named = [b for b in edit.branches if isinstance(b, BranchSite)]
    if len(named) + sum(isinstance(b, OperatorCall) for b in edit.branches) != len(
        edit.branches
    ) or any(b.copy for b in named):
        fail(
            "G300",
            "this version of graftc cannot apply parts or copies of a block as branches yet",
            span=edit.span,
        )
    if not named:
        fail("G357", "`parallel` has no matched site among its branches", span=edit.span)
    sites = tuple(match.bindings[b.binding] for b in named)
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
    new: list[NewModule] = []
    branches: list[str] = []
    for branch in edit.branches:
        if isinstance(branch, BranchSite):
            branches.append(match.bindings[branch.binding].path)
        else:
            assert isinstance(branch, OperatorCall)
            path = f"{sites[0].path}_graft{len(new)}"
            new.append(_new_module(branch, sites[0], match, rule, path))
            branches.append(path)
    new.append(_merge_module(MERGES[edit.merge], edit, sites, len(branches), index, of_blocks))
    return Edit(
        "parallel",
        rule,
        match,
        sites,
        sites[0].graph,
        tuple(new),
        tuple(branches),
        edit.merge,
        of_blocks,
        dict(edit.options),
    )


def _merge_module(
    spec: OperatorSpec,
    edit: Parallel,
    sites: tuple[Site, ...],
    count: int,
    index: int,
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
        f"{container}_merge.{index}"
        if of_blocks and container and last.isdigit()
        else f"{sites[0].path}_merge"
    )
    if spec.name == "sum" and of_blocks:  # a block's output holds its input: x + Σ (rᵢ − x)
        spec = replace(spec, module="graftc.operators.parallel:BlockSumMerge")
    given: dict[str, Value] = {"dim": sites[0].facts.get("dim"), "branches": count, **edit.options}
    arguments = {a.name: given.get(a.name, a.default) for a in spec.args}
    return NewModule(path, spec, arguments, "block" if of_blocks else "site", sites[0])  # type: ignore[arg-type]
