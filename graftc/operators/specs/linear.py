"""Specs of the linear maps of one token: the control that mixes no tokens, and the low-rank one."""

from __future__ import annotations

from graftc.operators.spec import (
    SITE,
    WHOLE,
    Apply,
    Arg,
    Arguments,
    Const,
    Cost,
    OfSite,
    OperatorSpec,
    Part,
    Slot,
)
from graftc.operators.specs._common import DIM, LINEAR, MLP, SELF_ATTENTION, fitted, integer, part


def _cost(arguments: Arguments, tokens: int) -> Cost:
    dim = integer(arguments, "dim")
    return Cost(dim * dim + dim, 2 * tokens * dim * dim, 0)


def _thin_cost(arguments: Arguments, tokens: int) -> Cost:
    rank, out = integer(arguments, "rank"), integer(arguments, "out_features")
    weights = rank * (integer(arguments, "in_features") + out)
    return Cost(weights + out, 2 * tokens * weights, 0)


SPECS = (
    OperatorSpec(
        name="token_linear",
        module="graftc.operators.linear:TokenLinear",
        summary="one linear map for every token",
        roles=(SELF_ATTENTION, MLP),
        mixes="nothing",
        args=(DIM,),
        slots=(Slot("proj", "proj", last=True),),
        inits={
            SELF_ATTENTION: {"proj": fitted(Apply("product", (part("out"), part("v"))))},
            MLP: {"proj": fitted(Apply("product", (part("down"), part("up"))))},
        },
        cost=_cost,
        source="Puzzle (arXiv 2411.19146): attention → Linear(W_o W_v)",
    ),
    OperatorSpec(
        name="low_rank",
        module="graftc.operators.linear:LowRank",
        summary="a linear map as the product of two thin ones",
        roles=(LINEAR,),
        mixes="channels",
        args=(
            Arg("rank", "int", required=True, minimum=1, doc="width between the two maps"),
            Arg("in_features", "int", OfSite("in_features"), minimum=1),
            Arg("out_features", "int", OfSite("out_features"), minimum=1),
        ),
        slots=(
            Slot("down", "down", doc="in_features to rank, no bias"),
            Slot("up", "up", last=True, doc="rank to out_features"),
        ),
        inits={LINEAR: {WHOLE: Apply("svd", (Part(SITE),), {"whiten": Const("calibration")})}},
        cost=_thin_cost,
        source="SVD-LLM, arXiv 2403.07378",
    ),
)
