"""Specs of the merges of `parallel(r1, … rk, merge = …)` (paper.md section 6).

A merge is no operator of its own: it has no site, and its forward takes the branches' outputs.
The roles are those of the branches: `block` (outputs hold the residual) and `site` (they do not).
"""

from __future__ import annotations

from graftc.operators.spec import Apply, Arg, Arguments, Const, Cost, OperatorSpec, Slot
from graftc.operators.specs._common import DIM, fitted, integer

BLOCK = "block"
SITE_BRANCH = "site"

_BRANCHES = Arg("branches", "int", required=True, minimum=2, doc="how many run in parallel")


def _sum_cost(arguments: Arguments, tokens: int) -> Cost:
    return Cost(0, 0, 0)  # additions on the residual stream are counted nowhere


def _linear_cost(arguments: Arguments, tokens: int) -> Cost:
    dim, branches = integer(arguments, "dim"), integer(arguments, "branches")
    return Cost(branches * dim * dim + dim, 2 * tokens * branches * dim * dim, 0)


def _gate_cost(arguments: Arguments, tokens: int) -> Cost:
    dim, branches = integer(arguments, "dim"), integer(arguments, "branches")
    wide = branches * dim
    return Cost(branches * (wide + 1), 2 * tokens * wide * branches, 0)


def _lerp_cost(arguments: Arguments, tokens: int) -> Cost:
    return Cost(1, 0, 0)


_LERP = {"factor": Apply("constant", (Const("start"),))}

MERGES = {
    "sum": OperatorSpec(
        name="sum",
        module="graftc.operators.parallel:SumMerge",  # of blocks: BlockSumMerge
        summary="sites add; blocks give x + Σ (rᵢ(x) − x)",
        roles=(BLOCK, SITE_BRANCH),
        mixes="nothing",
        args=(),
        slots=(),
        inits={BLOCK: {}, SITE_BRANCH: {}},
        cost=_sum_cost,
    ),
    "linear": OperatorSpec(
        name="linear",
        module="graftc.operators.parallel:LinearMerge",
        summary="a linear map of the concatenated outputs",
        roles=(BLOCK, SITE_BRANCH),
        mixes="channels",
        args=(DIM, _BRANCHES),
        slots=(Slot("proj", "proj", last=True),),
        inits={
            BLOCK: {"proj": fitted(Apply("mean_of_branches"))},
            SITE_BRANCH: {"proj": fitted(Apply("sum_of_branches"))},
        },
        cost=_linear_cost,
        source="Grafting (arXiv 2506.05340), section 6",
    ),
    "lerp": OperatorSpec(
        name="lerp",
        module="graftc.operators.parallel:LerpMerge",
        summary="(1 − s) · r1 + s · r2, s a learned scalar",
        roles=(BLOCK, SITE_BRANCH),
        mixes="nothing",
        args=(Arg("start", "float", 0.5, doc="the scalar's first value"),),
        slots=(Slot("factor", "", parameter="factor"),),
        inits={BLOCK: _LERP, SITE_BRANCH: _LERP},
        cost=_lerp_cost,
        source="Control LLM (arXiv 2501.10979)",
    ),
    "gate": OperatorSpec(
        name="gate",
        module="graftc.operators.parallel:GateMerge",
        summary="a weighted sum, its weights a softmax of a linear map of the outputs",
        roles=(BLOCK, SITE_BRANCH),
        mixes="channels",
        args=(DIM, _BRANCHES),
        slots=(Slot("gate", "gate"),),
        inits={BLOCK: {"gate": Apply("zero")}, SITE_BRANCH: {"gate": Apply("zero")}},
        cost=_gate_cost,
        source="Control LLM (arXiv 2501.10979), dynamic lerp",
    ),
}
"""Every merge, by the name that `merge =` takes."""
