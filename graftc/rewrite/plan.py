"""The plan: what a file does to a model, decided and priced before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftc.diagnostics import Diagnostic, GraftError, fail
from graftc.language.rules import Finetune, Rules
from graftc.operators.spec import CPU, Machine
from graftc.program.analysis import Analysis
from graftc.program.cost import parameter_count
from graftc.program.dropout import noted, told
from graftc.program.measured import MeasuredOn
from graftc.program.overview import overview
from graftc.program.program import Program
from graftc.rewrite.apply import apply
from graftc.rewrite.claims import check_claims
from graftc.rewrite.dataflow.own_side import own_side
from graftc.rewrite.dataflow.proof import proof_text, prove, signature
from graftc.rewrite.dataflow.view import program_view
from graftc.rewrite.edits import Edit, edits_of
from graftc.rewrite.form_texts import form_notes
from graftc.rewrite.match import Matches, match
from graftc.rewrite.price import Step, price
from graftc.rewrite.repeat import Round, pending_notes, round_texts, run_repeated
from graftc.rewrite.selections import selection_notes


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that `apply` and distillation need to know, and what a person wants to read.

    `notes`: warnings and notes of the file and of what its rules select; they stop nothing.
    `chains`: the model's overview (`program.overview`), for the drawing. `measured`: what measured selectors were
    measured on, None where nothing was. `machine`: where the student is to run.
    """

    steps: tuple[Step, ...]
    selections: tuple[Matches, ...]
    finetune: Finetune | None
    parameters: tuple[int, int]
    flops: tuple[int, int]
    notes: tuple[Diagnostic, ...] = ()
    checks: tuple[str, ...] = ()
    rounds: tuple[Round, ...] = ()
    chains: tuple[Mapping[str, Any], ...] = ()
    measured: MeasuredOn | None = None
    machine: Machine = CPU

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(s.edit for s in self.steps)


def make_plan(rules: Rules, analysis: Analysis, machine: Machine = CPU) -> Plan:
    """Match all rules on the original Program, choose forms for `machine`, check claims, price.

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
    warned = analysis.program.facts.warnings
    notes = [*rules.notes, *warned, *(analysis.measured.notes if analysis.measured else ())]
    taken = {path for path, _ in analysis.program.root.named_modules(remove_duplicate=False)}
    view = program_view(analysis.flat)
    for rule in rules.rules:
        try:
            own = tuple(own_side(rule))
            notes += (d for d in own if d.severity != "error")
            if problem := [d for d in own if d.severity == "error"]:
                problems += problem
                continue
            if rule.repeat is not None:
                continue  # it runs on what the others made
            matches = match(rule, analysis, view)
            edits += edits_of(rule, matches.found, analysis, taken, machine)
            notes += selection_notes(matches)
            selections.append(matches)
        except GraftError as error:
            problems += error.diagnostics
    if problems:
        raise GraftError(*problems)
    check_claims([e.claim for e in edits])
    notes += form_notes(edits, machine)
    # Applied without weights: what cannot be applied is said now, and parameters are counted, not added up.
    student, _ = apply(analysis.program, edits, on_meta=True)
    steps = tuple(price(e, analysis, student) for e in edits)
    checks = _proved(selections, edits, analysis)
    flops = analysis.flops.get("", 0)
    after = flops + sum(s.after.flops - s.before.flops for s in steps)
    repeated = [r for r in rules.rules if r.repeat is not None]
    student, rounds = run_repeated(repeated, student)
    notes += dropout_notes(analysis.program, student)
    after += sum(r.flops for r in rounds)
    notes += pending_notes(rounds)
    return Plan(
        steps,
        tuple(selections),
        rules.finetune,
        (analysis.parameters, parameter_count(student)),
        (flops, after),
        tuple(notes),
        (*checks, *round_texts(rounds)),
        rounds,
        chains=tuple(overview(analysis)),
        measured=analysis.measured,
        machine=machine,
    )


def dropout_notes(teacher: Program, student: Program) -> list[Diagnostic]:
    """A note (G832) on the dropout of train mode: where the student has it, and where it went with what was replaced."""
    if not told(teacher):
        return []
    before, after = (Counter(d.p for *_, d in noted(p)) for p in (teacher, student))
    gone = sum((before - after).values())
    went = f"; at {gone} more it went with what the rules replace" if gone else ""
    kept = told(student) or "no dropout"
    help_ = "`student.train()` turns it on, as stage 2 does; stage 1 trains without"
    message = f"the student keeps the original's train mode: {kept}{went}"
    return [Diagnostic("G832", message, site="MODEL", help=help_, severity="note")]


def _proved(selections: list[Matches], edits: list[Edit], analysis: Analysis) -> tuple[str, ...]:
    """A line for each exact rule that rewrites ops: regions of one form are run once, on random weights."""
    said: list[str] = []
    for rule in (s.rule for s in selections if s.rule.contract == "exact"):
        regions = {signature(e.ops): e.ops for e in edits if e.rule is rule and e.ops is not None}
        proofs = [prove(rule, region, analysis.program) for region in regions.values()]
        if proofs:
            said.append(proof_text(rule, proofs))
    return tuple(said)
