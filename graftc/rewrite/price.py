"""What an edit costs, and where its new weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from graftc.diagnostics import Span
from graftc.language.evaluate import settled
from graftc.operators.spec import Apply, Cost, InitSource, Part
from graftc.operators.tokens import Tokens
from graftc.program.analysis import Analysis, Site
from graftc.program.parts import part_refs
from graftc.program.program import Program
from graftc.rewrite.block_parts import bound_site
from graftc.rewrite.edit_rewrite import rewrite_price
from graftc.rewrite.edits import Edit, Fold, NewModule
from graftc.rewrite.facts import bound_fact
from graftc.rewrite.stream import StreamFold
from graftc.weights.initialise import Origin, plan_init
from graftc.weights.sources import parts_of


@dataclass(frozen=True, eq=False)
class Candidate:
    """What a site of `one of` can become: its price and its weights' origins; `new` None: it stays."""

    new: NewModule | None
    cost: Cost
    origins: tuple[Origin, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """One edit with its price: parameters and FLOPs of a forward pass of one sample, and its weights' origins.

    `candidates`: of `one of`, all of them, the student's first. `runs`: how often a forward pass runs the
    site, in a block that several calls share; FLOPs are of all runs.
    """

    edit: Edit
    before: Cost
    after: Cost
    origins: tuple[Origin, ...]
    dropped: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()
    runs: int = 1


def price(edit: Edit, analysis: Analysis, student: Program) -> Step:
    """An edit with its price; `student` is the program with all edits made."""
    new = Cost(0, 0, 0)
    origins: list[Origin] = []
    for module in edit.new:
        new = _sum(new, _cost(module))
        origins += _origins(edit, module, analysis)
    if edit.fold is not None:
        origins += _fold_origins(edit, edit.fold)
    if edit.stream is not None:
        origins += _stream_origins(edit, edit.stream)
    if edit.kind in ("parallel", "insert", "together"):  # what is there stays
        return Step(edit, Cost(0, 0, 0), new, tuple(origins), ())
    if edit.ops is not None:
        return Step(edit, *rewrite_price(edit, edit.ops, analysis, student))
    (site,) = edit.sites
    runs = analysis.call_counts[id(analysis.program.module(site.path))]
    counted = len(analysis.flat.calls_by_path[site.path])  # the site's own FLOPs are of these
    before = Cost(_int(site, "params"), _int(site, "flops") * runs // counted, 0)
    new = Cost(new.params, new.operator_flops * runs, new.featuriser_flops * runs)
    candidates = tuple(_candidate(edit, c, before, analysis) for c in edit.candidates)
    if candidates and edit.candidates[0] is None:  # the student keeps the site
        return Step(edit, before, before, (), (), candidates, runs)
    dropped = _dropped(site, analysis, student)
    return Step(edit, before, new, tuple(origins), dropped, candidates, runs)


def _cost(module: NewModule) -> Cost:
    tokens = module.site.facts.get("tokens")
    known = {**module.site.facts, **module.arguments}
    return module.spec.cost(known, tokens if isinstance(tokens, int) else 1)


def formula(module: NewModule) -> tuple[str, str]:
    """FLOPs of one sample as formulas in the token count N: of the operator, and of its featurisers.

    A module of a fixed token count, or one of a file of the user's, gives numbers.
    """
    spec = module.spec
    if spec.is_fixed(module.arguments) or not spec.module.startswith("graftc.operators."):
        plain = _cost(module)
        return f"{plain.operator_flops:,}", f"{plain.featuriser_flops:,}"
    known = {**module.site.facts, **module.arguments}
    cost: Any = spec.cost(known, cast("int", Tokens((0, 1))))
    return str(cost.operator_flops), str(cost.featuriser_flops)


def _candidate(edit: Edit, new: NewModule | None, before: Cost, analysis: Analysis) -> Candidate:
    if new is None:
        return Candidate(None, before, ())
    return Candidate(new, _cost(new), tuple(_origins(edit, new, analysis)))


def _fold_origins(edit: Edit, fold: Fold) -> list[Origin]:
    """The linears that a norm's scale and shift move into."""
    norm = next((n for n in fold.second if n), "the norm").rpartition(".")[0]
    return [
        Origin(name, "", f"itself, with the scale and shift of {norm}", "")
        for weight, bias, _ in fold.weights
        for name in (weight, bias)
        if name is not None
    ]


def _stream_origins(edit: Edit, fold: StreamFold) -> list[Origin]:
    """Writers of the residual stream without their mean, and what the norm's scale and shift move into."""
    norm = edit.sites[0].path
    said = [Origin(n, "", "itself, with the mean taken out", "") for n, _ in fold.writers]
    return said + [
        Origin(name, "", f"itself, with the scale and shift of {norm}", "")
        for weight, bias, _ in fold.readers
        for name in (weight, bias)
        if name is not None
    ]


def copy_origins(program: Program, new: NewModule) -> list[Origin]:
    """A copy's parameters: the source's, or zero."""
    assert new.copied is not None
    zero = {n for ref in new.copied.zero for n in (ref.weight, ref.bias)}
    found: list[Origin] = []
    for name, _ in program.module(new.copied.source).named_parameters():
        source = f"{new.copied.source}.{name}"
        text = "zero" if source in zero else f"copy({source})"
        found.append(Origin(f"{new.path}.{name}", name, text, ""))
    return found


def _origins(edit: Edit, module: NewModule, analysis: Analysis) -> list[Origin]:
    """Where each parameter comes from, by its name in the student."""
    if module.copied is not None:
        return copy_origins(analysis.program, module)
    clause = init_clause(edit, module, analysis)
    found = plan_init(
        module.spec,
        module.arguments,
        module.role,
        clause.sources,
        {name: part_refs(analysis, s.path) for name, s in clause.sites.items()},
        module.path,
        binding=clause.binding,
        spans=clause.spans,
    )
    return [replace(o, parameter=f"{module.path}.{o.parameter}") for o in found]


@dataclass(frozen=True)
class InitClause:
    """A rule's init clause for one new module: (slot, source), and the name its default sources mean.

    `sites`: what a source may read by name: the rule's bindings, and sites inside a block (`b.mlp`).
    """

    sources: tuple[tuple[str | None, InitSource], ...]
    spans: Mapping[str | None, Span]
    binding: str
    sites: Mapping[str, Site]


def init_clause(edit: Edit, module: NewModule, analysis: Analysis) -> InitClause:
    """The clause fills the rule's operator, or each of its candidates; a merge beside one keeps its default.

    Raises GraftError (G450) where a source reads a site inside a block that is not there, or not the only one.
    """
    name = next((n for n, s in edit.match.bindings.items() if s is module.site), "site")
    own = next((n for n in edit.new if n.copied is None), None)
    if module is not own and module not in edit.candidates:
        return InitClause((), {}, name, edit.match.bindings)
    bound = edit.match.bindings
    sources = tuple(
        ("norm", Apply("fold"))
        if i.source == Apply("fold", (Part(name),))
        else (i.slot, settled(i.source, lambda f: bound_fact(f, bound)))
        for i in edit.rule.inits
    )
    if not sources and module.spec.fitted is not None:
        slots = module.spec.fitted(module.arguments, module.site.facts)
        sources = tuple((slot, Apply("least_squares")) for slot in slots)
    inner = {
        part.site: bound_site(analysis, edit.match, part.site, init.span)
        for init in edit.rule.inits
        for part in parts_of(init.source)
        if "." in part.site
    }
    spans = {i.slot: i.span for i in edit.rule.inits}
    return InitClause(sources, spans, name, {**bound, **inner})


def _dropped(site: Site, analysis: Analysis, student: Program) -> tuple[str, ...]:
    """Teacher parameters of the site that the student no longer has under any name."""
    kept = {id(p) for p in student.root.parameters()}
    module = analysis.program.root.get_submodule(site.path)
    return tuple(f"{site.path}.{n}" for n, p in module.named_parameters() if id(p) not in kept)


def _int(site: Site, name: str) -> int:
    value = site.facts.get(name)
    return value if isinstance(value, int) else 0


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(
        a.params + b.params,
        a.operator_flops + b.operator_flops,
        a.featuriser_flops + b.featuriser_flops,
    )
