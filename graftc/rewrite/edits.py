"""Edits as values: what a rule's match becomes, decided before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from graftc.diagnostics import Span, fail
from graftc.language.rules import Init, OperatorCall, Remove, Replace, Rule, Skip
from graftc.operators.forms import Choice
from graftc.operators.spec import CPU, Apply, Machine, OperatorSpec, Part, Value
from graftc.program.analysis import Analysis, Site
from graftc.program.parts import PartRef
from graftc.rewrite.arguments import check_fits, check_role, resolve_arguments
from graftc.rewrite.chosen_forms import chosen
from graftc.rewrite.claims import Claim
from graftc.rewrite.dataflow.region import Region
from graftc.rewrite.inputs import kept_inputs
from graftc.rewrite.lengths import check_tokens
from graftc.rewrite.match import Match
from graftc.rewrite.stream import StreamFold, stream_fold
from graftc.rewrite.user_files import unread
from graftc.rewrite.user_operator import INPUTS, spec_at

Kind = Literal["replace", "parallel", "together", "insert", "remove", "skip", "rewrite"]


@dataclass(frozen=True, eq=False)
class Copied:
    """A new module that is a copy: `source` is its path in the original, `zero` what starts at zero.

    `zero` are parts of the original; the copy's own weights at the same places are meant.
    """

    source: str
    zero: tuple[PartRef, ...] = ()


@dataclass(frozen=True, eq=False)
class NewModule:
    """An operator to be put into the student.

    `role`: which of the spec's default inits applies. `site`: the site whose parts they speak of.
    `inputs`: parameter of its forward → which argument of the site's call it takes, beside the stream.
    `copied`: for a copy of a module of the original; its spec then has only a name and a cost. `choice`: of an
    operator that has several forms, which it is, and why.
    """

    path: str
    spec: OperatorSpec
    arguments: Mapping[str, Value]
    role: str
    site: Site
    inputs: Mapping[str, int] = field(default_factory=dict[str, int])
    copied: Copied | None = None
    choice: Choice | None = None


@dataclass(frozen=True, eq=False)
class Fold:
    """A norm's scale and shift that move into linears: these then compute on another norm's output.

    `first` and `second` are modules that differ in scale and shift alone: names of the scale and the
    shift parameter by path from the root, None where there is none. `weights`: (weight, bias,
    stored transposed) of each linear that read `second`.
    """

    first: tuple[str | None, str | None]
    second: tuple[str | None, str | None]
    weights: tuple[tuple[str, str | None, bool], ...]


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit at one place.

    `kind`: which of the table in `graftc.rewrite.apply` makes it. `sites`: what it rewires, in data-flow
    order. `graph`: the path of the graph whose calls it rewires. `new`: operators it brings.
    `branches`: for 'parallel', in order, a site's path or the path of a new module. `merge`: its merge.
    `fold`: for 'together', what moves into the linears of the second site. `region`: for 'together',
    the block that holds them: what is distilled. `candidates`: for `one of`, what the site can become,
    each built beside the student (None: it stays); the first is the student's. `ops`: for 'rewrite', the
    ops of the graph that it rewrites. `stream`: for `init fold(n)`, the weights of other modules that change.
    """

    kind: Kind
    rule: Rule
    match: Match
    sites: tuple[Site, ...]
    graph: str
    new: tuple[NewModule, ...] = ()
    branches: tuple[str, ...] = ()
    merge: str = ""
    of_blocks: bool = False
    options: Mapping[str, Value] = field(default_factory=dict[str, Value])
    fold: Fold | None = None
    region: Site | None = None
    candidates: tuple[NewModule | None, ...] = ()
    ops: Region | None = None
    stream: StreamFold | None = None

    @property
    def name(self) -> str:
        """What plans and targets call it; an inserted module by its own path."""
        if self.kind == "insert":
            return self.new[0].path
        if self.ops is not None:
            return self.ops.name
        return "+".join(s.path for s in self.sites)

    @property
    def origin(self) -> str:
        """The place in the `.graft` file that made it."""
        return str(self.rule.edit.span)

    @property
    def claim(self) -> Claim:
        paths = tuple(s.path for s in self.sites)
        return Claim(
            self.rule.name,
            self.rule.edit.span,
            paths,
            inside=self.kind in ("replace", "remove", "skip", "together"),
            kind=self.kind,
            after=self.rule.after,
            nodes=frozenset((s.graph, s.node) for s in self.sites)
            | frozenset((p.graph, p.node) for p in (self.ops.gone if self.ops else ())),
            opened=self.ops.opened if self.ops else (),
            weights=self.stream.modules if self.stream else (),
        )


@dataclass(frozen=True)
class Place:
    """Where a rule matched: what making an edit of it needs to know.

    `index` counts the rule's matches; `taken` are module paths that a new module cannot have. `machine`: where the
    student is to run.
    """

    rule: Rule
    match: Match
    index: int
    analysis: Analysis
    taken: set[str]
    machine: Machine = CPU

    def fresh(self, path: str) -> str:
        """`<path>_graft<n>`: a path for a new module beside one that is there."""
        n = 0
        while f"{path}_graft{n}" in self.taken:
            n += 1
        self.taken.add(f"{path}_graft{n}")
        return f"{path}_graft{n}"


def edits_of(
    rule: Rule,
    matches: tuple[Match, ...],
    analysis: Analysis,
    taken: set[str],
    machine: Machine = CPU,
) -> list[Edit]:
    """The edits of a rule, one for each match. Raises GraftError where the model does not allow one.

    `taken`: the paths that modules have; those of new modules are added.
    """
    from graftc.rewrite.edit_kinds import EDITS

    edit = rule.edit
    make: Callable[[Place, Any], Edit] = EDITS[type(edit)]
    edits = [make(Place(rule, m, i, analysis, taken, machine), edit) for i, m in enumerate(matches)]
    if any(e.stream for e in edits):
        edits = _written_once(edits)
    elif (fold := _fold_of(rule)) is not None:
        _no_norm(fold.span)
    for made in edits:
        for site in made.sites:
            _check_called_once(made, site, analysis)
    return edits


def _check_called_once(edit: Edit, site: Site, analysis: Analysis) -> None:
    """An edit changes one call. A module that runs several times, each time by that call, changes in all of them."""
    calls = analysis.caller_counts[id(analysis.program.module(site.path))]
    if calls > 1:
        fail(
            "G361",
            f"{site.path} is shared: {calls} calls in the model run it",
            span=edit.rule.edit.span,
            site=site.path,
            help="edit a site inside it: that changes it in all its runs",
        )


def new_module(place: Place, call: OperatorCall, site: Site, path: str) -> NewModule:
    """An operator of the rule at a site, its arguments resolved and checked."""
    drop = place.rule.drop
    call = replace(call, spec=call.spec.for_role(site.role))
    unread(call.spec, call.span)
    check_role(call.spec, site, call.span)
    arguments = resolve_arguments(call, site, place.match, drop)
    passes = [what for what in INPUTS if what not in drop]
    call = replace(call, spec=spec_at(call, arguments, site, place.analysis, passes))
    check_fits(call.spec, arguments, site, call.span, drop)
    arguments, choice = chosen(call, arguments, site, place.machine)
    check_tokens(call.spec, arguments, site, place.analysis, call.span)
    inputs = kept_inputs(call.spec, arguments, site, drop, call.span)
    return NewModule(path, call.spec, arguments, site.role, site, inputs, choice=choice)


def replace_edit(place: Place, edit: Replace) -> Edit:
    site = place.match.bindings[edit.binding]
    new = new_module(place, edit.operator, site, site.path)
    stream = None
    fold = _fold_of(place.rule)
    if fold is not None:
        if new.spec.name != "rms_norm" or site.role != "norm" or _folded(fold) != edit.binding:
            _no_norm(fold.span)
        stream = stream_fold(place.analysis, site, edit.binding, fold.span)
    return Edit("replace", place.rule, place.match, (site,), site.graph, (new,), stream=stream)


def _fold_of(rule: Rule) -> Init | None:
    """The rule's `init fold(n)`."""
    for init in rule.inits:
        if isinstance(init.source, Apply) and init.source.policy == "fold":
            return init
    return None


def _folded(init: Init) -> str | None:
    source = init.source.args[0] if isinstance(init.source, Apply) else None
    return source.site if isinstance(source, Part) and source.name is None else None


def _no_norm(span: Span) -> NoReturn:
    fail(
        "G436",
        "`fold` is for a norm that becomes an rms_norm",
        span=span,
        wanted="replace n with rms_norm(eps = eps(n)), init fold(n)",
    )


def _written_once(edits: list[Edit]) -> list[Edit]:
    """Norms of one stream share its writers: the first edit takes their mean out, for all."""
    taken: set[str] = set()
    found: list[Edit] = []
    for edit in edits:
        assert edit.stream is not None
        writers = tuple(w for w in edit.stream.writers if w[0] not in taken)
        taken |= {name for name, _ in writers}
        found.append(replace(edit, stream=replace(edit.stream, writers=writers)))
    return found


def remove_edit(place: Place, edit: Remove) -> Edit:
    site = place.match.bindings[edit.binding]
    if site.role == "block":
        fail(
            "G356",
            f"{site.path} is a block: its output holds the residual stream",
            span=edit.span,
            help=f"write `skip {edit.binding}`",
        )
    return Edit("remove", place.rule, place.match, (site,), site.graph)


def skip_edit(place: Place, edit: Skip) -> Edit:
    site = place.match.bindings[edit.binding]
    if site.role != "block":
        fail(
            "G356",
            f"{site.path} is no block",
            span=edit.span,
            help=f"write `remove {edit.binding}`",
        )
    return Edit("skip", place.rule, place.match, (site,), site.graph)
