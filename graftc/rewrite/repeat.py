"""`repeat(measure)`: a rule that runs on the student of all other edits until it matches nowhere.

Each round applies every match at once; the measure must be smaller after it than before, so that it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from graftc.diagnostics import Diagnostic, GraftError, fail
from graftc.language.rules import DataflowMatch, Measure, Rule
from graftc.program.analysis import Analysis, analyse
from graftc.program.cost import parameter_count
from graftc.program.program import Program
from graftc.rewrite.apply import Patch, apply, undo
from graftc.rewrite.claims import check_claims
from graftc.rewrite.dataflow.proof import Proof, proof_text, prove
from graftc.rewrite.dataflow.view import ProgramView, program_view
from graftc.rewrite.edits import Edit, edits_of
from graftc.rewrite.match import Matches, find_matches, match, selection
from graftc.rewrite.opened import opened
from graftc.rewrite.price import price
from graftc.weights.initialise import Origin


@dataclass(frozen=True, eq=False)
class Round:
    """One application of a repeated rule: its edits, the measure before and after, the way back.

    `flops`: how many FLOPs of a sample came (or, negative, went). `origins`: where the weights of its new modules
    come from.
    """

    rule: Rule
    edits: tuple[Edit, ...]
    before: int
    after: int
    patch: Patch
    flops: int = 0
    proofs: tuple[Proof, ...] = ()
    origins: tuple[Origin, ...] = ()


Fill = Callable[[Sequence[Edit], Analysis, Program], None]
"""Gives the new modules of edits their first weights, in place, from the parts of what the edits were made on."""


def run_repeated(
    rules: Sequence[Rule], student: Program, *, fill: Fill | None = None
) -> tuple[Program, tuple[Round, ...]]:
    """The student after all rounds of all repeated rules. Raises GraftError where a measure does not fall.

    A rule must match at least once; the rounds after the first end when it matches nowhere. `fill`: None: new
    modules have no weights. What a round puts in is the next one's to match: it stands there as its ops.
    """
    on_meta = fill is None
    rounds: list[Round] = []
    for rule in rules:
        if rule.repeat is None:
            continue
        number = 0
        while True:
            analysis = analyse(student)
            view = program_view(analysis.flat)
            found = match(rule, analysis, view) if not number else _further(rule, analysis, view)
            if not found.found:
                break
            taken = {p for p, _ in student.root.named_modules(remove_duplicate=False)}
            edits = edits_of(rule, found.found, analysis, taken)
            check_claims([e.claim for e in edits])
            proofs = (
                tuple(prove(rule, e.ops, student) for e in edits if e.ops is not None)
                if rule.contract == "exact"
                else ()
            )
            before = measured(rule.repeat, analysis)
            made, patch = apply(student, edits, on_meta=on_meta)
            steps = [price(e, analysis, made) for e in edits if e.new]
            if fill is not None:
                fill(edits, analysis, made)
            student = opened(made, [n for e in edits for n in e.new])
            then = analyse(student)
            after = measured(rule.repeat, then)
            if after >= before:
                fail(
                    "G389",
                    f"the measure of rule `{rule.name}` does not fall",
                    span=rule.repeat.span,
                    wanted=f"less than {before}",
                    found=f"{after} after round {number + 1}, of {len(edits)} matches",
                    help="choose a measure that each step makes smaller, or leave out `repeat`",
                )
            origins = tuple(o for s in steps for o in s.origins)
            flops = then.flops.get("", 0) - analysis.flops.get("", 0)
            rounds.append(Round(rule, tuple(edits), before, after, patch, flops, proofs, origins))
            number += 1
    return student, tuple(rounds)


_NO_MORE = frozenset(["G131", "G132", "G136", "G310", "G311", "G312", "G313", "G314", "G332"])
"""What a rule on sites says where it matches nowhere any more: the blocks or the sites have gone."""


def _further(rule: Rule, analysis: Analysis, view: ProgramView) -> Matches:
    """The matches of a later round, be there any or none; `expect` is of the first."""
    if any(isinstance(m, DataflowMatch) for m in rule.matches):
        return find_matches(rule, analysis, view)
    try:
        return selection(replace(rule, expect=None), analysis, view)
    except GraftError as error:
        if all(d.code in _NO_MORE for d in error.diagnostics):
            return Matches(rule, (), ())
        raise


def measured(measure: Measure, analysis: Analysis) -> int:
    """A measure of a Program: ops, parameters, FLOPs of a sample, or the ops of one name."""
    if measure.kind == "params":
        return parameter_count(analysis.program)
    if measure.kind == "flops":
        return analysis.flops.get("", 0)
    if measure.kind == "count":
        return len(program_view(analysis.flat).named(measure.op))
    return sum(o.kind in ("op", "module") for o in analysis.flat.ops)


def _origin_texts(rounds: Sequence[Round]) -> tuple[str, ...]:
    """Where the new weights of all rounds come from: parameters of one name and origin in one line."""
    found: dict[tuple[str, str, bool], int] = {}
    for new, origin in ((n, o) for r in rounds for e in r.edits for n in e.new for o in r.origins):
        if origin.parameter.startswith(new.path + "."):
            name = origin.parameter.removeprefix(new.path + ".")
            key = (name, origin.text, origin.pending)
            found[key] = found.get(key, 0) + 1
    return tuple(
        f"{count} × {name}: {text}"
        + (" (NOT fitted: a rule that repeats has no data)" if pending else "")
        for (name, text, pending), count in found.items()
    )


def pending_notes(rounds: Sequence[Round]) -> Iterator[Diagnostic]:
    """A note for each repeated rule whose new weights stay where a fit on data would have begun."""
    for rule in dict.fromkeys(r.rule.name for r in rounds):
        mine = [r for r in rounds if r.rule.name == rule]
        left = sum(o.pending for r in mine for o in r.origins)
        if left:
            yield Diagnostic(
                "G447",
                f"{left} new parameters of rule `{rule}` are not fitted on data",
                span=mine[0].rule.edit.span,
                found="they stay at what a fit begins with: a rule that repeats has no targets",
                help="give them an `init` that needs no data",
                severity="note",
            )


def undo_rounds(student: Program, rounds: Sequence[Round]) -> Program:
    """The student before the rounds, bit for bit."""
    for done in reversed(rounds):
        student = undo(student, done.patch)
    return student


def round_texts(rounds: Sequence[Round]) -> tuple[str, ...]:
    """A line for each repeated rule, and one for its proofs."""
    said: list[str] = []
    for rule in dict.fromkeys(r.rule.name for r in rounds):
        mine = [r for r in rounds if r.rule.name == rule]
        measure = mine[0].rule.repeat
        assert measure is not None
        falls = " → ".join(str(n) for n in (mine[0].before, *(r.after for r in mine)))
        what = f"count({measure.op})" if measure.kind == "count" else measure.kind
        count = sum(len(r.edits) for r in mine)
        said.append(
            f"rule `{rule}` ran {len(mine)} time{'s' * (len(mine) > 1)}, {count} matches: {what} {falls}"
        )
        said += [f"its new weights, {text}" for text in _origin_texts(mine)]
        proofs = [p for r in mine for p in r.proofs]
        if proofs:
            said.append(proof_text(mine[0].rule, proofs))
    return tuple(said)
