"""`rewrite { … }`: the ops of a match become others; what that costs, and what new weights are made of."""

from __future__ import annotations

from graftc.diagnostics import fail
from graftc.language.rules import Rewrite
from graftc.operators.spec import Cost
from graftc.program.analysis import Analysis, batch_size
from graftc.program.cost import op_flops
from graftc.program.program import Program, join
from graftc.rewrite.dataflow.region import Region, region_of
from graftc.rewrite.dataflow.rewriting import gone_ops, new_nodes
from graftc.rewrite.dataflow.view import ops_of
from graftc.rewrite.edits import Edit, Place
from graftc.weights.initialise import Origin


def rewrite_edit(place: Place, edit: Rewrite) -> Edit:
    rule, match = place.rule, place.match
    if rule.distill is not None:
        fail(
            "G386",
            "a rewrite of ops is not distilled: it is no module with an input and an output",
            span=rule.distill.span,
            help="leave out `distill`, or replace a site",
        )
    assert match.occurrence is not None
    region = region_of(rule, match.occurrence, place.analysis)
    return Edit("rewrite", rule, match, (), region.host, ops=region)


def rewrite_price(
    edit: Edit, region: Region, analysis: Analysis, student: Program
) -> tuple[Cost, Cost, tuple[Origin, ...], tuple[str, ...]]:
    """Before, after, origins and dropped parameters: those of the ops taken away and of those that came."""
    assert isinstance(edit.rule.edit, Rewrite)
    kept = {id(p) for p in student.root.parameters()}
    original = dict(analysis.program.root.named_parameters(remove_duplicate=False))
    read = {f: original[f] for f in dict.fromkeys(region.parameters.values()) if f in original}
    dropped = {f: p for f, p in read.items() if id(p) not in kept}
    sources = {n.name: n.value.span.text for n in edit.rule.edit.new}
    new = new_nodes(student, region)
    made = {
        join(region.host, str(n.target)): n
        for n in new
        if n.op == "get_attr" and str(n.target).rpartition("_graft")[0] in sources
    }
    origins = tuple(
        Origin(f, slot, sources[slot], "")
        for f, n in made.items()
        for slot in [str(n.target).rpartition("_graft")[0]]
    )
    gone = sum(op_flops(o) for o in gone_ops(region))
    came = sum(op_flops(o) for o in ops_of(new))
    batch = max(1, batch_size(analysis.program))
    return (
        Cost(sum(p.numel() for p in dropped.values()), gone // batch, 0),
        Cost(sum(student.root.get_parameter(f).numel() for f in made), came // batch, 0),
        origins,
        tuple(dropped),
    )
