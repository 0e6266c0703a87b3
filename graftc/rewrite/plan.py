"""The plan: what a file does to a model, decided and priced before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graftc.diagnostics import Diagnostic, GraftError, Span, fail
from graftc.language.evaluate import settled
from graftc.language.rules import Finetune, Rules
from graftc.operators.spec import Cost, InitSource
from graftc.program.analysis import Analysis, Site
from graftc.program.cost import parameter_count
from graftc.program.parts import part_refs
from graftc.program.program import Program
from graftc.rewrite.apply import apply
from graftc.rewrite.claims import check_claims
from graftc.rewrite.edits import Edit, NewModule, edits_of
from graftc.rewrite.match import Matches, match, site_fact
from graftc.weights.initialise import Origin, plan_init


@dataclass(frozen=True, eq=False)
class Step:
    """One edit with its price: parameters and FLOPs of a forward pass of one sample, and its weights' origins."""

    edit: Edit
    before: Cost
    after: Cost
    origins: tuple[Origin, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that `apply` and distillation need to know, and what a person wants to read."""

    steps: tuple[Step, ...]
    selections: tuple[Matches, ...]
    finetune: Finetune | None
    parameters: tuple[int, int]
    flops: tuple[int, int]

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(s.edit for s in self.steps)


def make_plan(rules: Rules, analysis: Analysis) -> Plan:
    """Match all rules on the original Program, check their claims, price them.

    Raises GraftError with every rule's first problem.
    """
    if not rules.rules:
        fail(
            "G301",
            "the file has no rule",
            site=rules.files[0] if rules.files else None,
            help="write `rule NAME { match … replace … }`",
        )
    selections: list[Matches] = []
    edits: list[Edit] = []
    problems: list[Diagnostic] = []
    for rule in rules.rules:
        try:
            matches = match(rule, analysis)
            edits += edits_of(rule, matches.found, analysis)
            selections.append(matches)
        except GraftError as error:
            problems += error.diagnostics
    if problems:
        raise GraftError(*problems)
    check_claims([e.claim for e in edits])
    # Applied without weights: what cannot be applied is said now, and parameters are counted, not added up.
    student, _ = apply(analysis.program, edits, on_meta=True)
    steps = tuple(_step(e, analysis, student) for e in edits)
    flops = analysis.flops.get("", 0)
    return Plan(
        steps,
        tuple(selections),
        rules.finetune,
        (analysis.parameters, parameter_count(student)),
        (flops, flops + sum(s.after.flops - s.before.flops for s in steps)),
    )


def _step(edit: Edit, analysis: Analysis, student: Program) -> Step:
    new = Cost(0, 0, 0)
    origins: list[Origin] = []
    for module in edit.new:
        tokens = module.site.facts.get("tokens")
        known = {**module.site.facts, **module.arguments}
        cost = module.spec.cost(known, tokens if isinstance(tokens, int) else 1)
        new = _sum(new, cost)
        origins += _origins(edit, module, analysis)
    if edit.kind == "parallel":  # the branches stay
        return Step(edit, Cost(0, 0, 0), new, tuple(origins), ())
    (site,) = edit.sites
    before = Cost(_int(site, "params"), _int(site, "flops"), 0)
    return Step(edit, before, new, tuple(origins), _dropped(site, analysis, student))


def _origins(edit: Edit, module: NewModule, analysis: Analysis) -> list[Origin]:
    """Where each parameter comes from, by its name in the student."""
    clause = init_clause(edit, module)
    found = plan_init(
        module.spec,
        module.arguments,
        module.role,
        clause.sources,
        {name: part_refs(analysis, s.path) for name, s in edit.match.bindings.items()},
        module.path,
        binding=clause.binding,
        spans=clause.spans,
    )
    return [replace(o, parameter=f"{module.path}.{o.parameter}") for o in found]


@dataclass(frozen=True)
class InitClause:
    """A rule's init clause for one new module: (slot, source), and the name its default sources mean."""

    sources: tuple[tuple[str | None, InitSource], ...]
    spans: Mapping[str | None, Span]
    binding: str


def init_clause(edit: Edit, module: NewModule) -> InitClause:
    """The clause fills the rule's operator; a merge beside one keeps its own default."""
    name = next((n for n, s in edit.match.bindings.items() if s is module.site), "site")
    if module is not edit.new[0]:
        return InitClause((), {}, name)
    bound = edit.match.bindings
    sources = tuple(
        (i.slot, settled(i.source, lambda f: site_fact(bound[f.binding], f.name, f.span)))
        for i in edit.rule.inits
    )
    return InitClause(sources, {i.slot: i.span for i in edit.rule.inits}, name)


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


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data for YAML and JSON."""
    return {
        "version": 1,
        "edits": [_step_dict(s) for s in plan.steps],
        "filtered": [
            {"rule": m.rule.name, "path": f.path, "reason": f.reason}
            for m in plan.selections
            for f in m.filtered
        ],
        "totals": {
            "parameters": {"before": plan.parameters[0], "after": plan.parameters[1]},
            "flops": {"before": plan.flops[0], "after": plan.flops[1]},
        },
    }


def _step_dict(step: Step) -> dict[str, Any]:
    edit = step.edit
    return {
        "site": edit.name,
        "rule": edit.rule.name,
        "origin": edit.origin,
        "contract": edit.rule.contract,
        "edit": edit.kind,
        "before": " + ".join(f"{s.role}" for s in edit.sites),
        "after": after_text(edit),
        "parameters": {"before": step.before.params, "after": step.after.params},
        "flops": {
            "before": step.before.flops,
            "after": step.after.flops,
            "after_operator": step.after.operator_flops,
            "after_featuriser": step.after.featuriser_flops,
        },
        "weights": [
            {"parameter": o.parameter, "from": o.text, "pending": o.pending} for o in step.origins
        ],
        "dropped": list(step.dropped),
    }


def after_text(edit: Edit) -> str:
    """What a site becomes, in a few words: `hyena_x(kernel=4, causal=True)`."""
    if edit.kind == "remove":
        return "nothing (contributes zero)"
    if edit.kind == "skip":
        return "the identity on the residual stream"
    if edit.kind == "parallel":
        return f"parallel({', '.join(edit.branches)}, merge = {edit.merge})"
    new = edit.new[0]
    own = {a.name for a in new.spec.args if a.name not in ("dim", "heads", "kv_heads", "head_dim")}
    shown = ", ".join(f"{k} = {_word(v)}" for k, v in new.arguments.items() if k in own)
    return f"{new.spec.name}({shown})"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
