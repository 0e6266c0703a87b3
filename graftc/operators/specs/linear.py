"""Spec of the token-wise linear map: the control that mixes no tokens."""

from __future__ import annotations

from graftc.operators.spec import Apply, Arguments, Cost, OperatorSpec, Slot
from graftc.operators.specs._common import DIM, MLP, SELF_ATTENTION, fitted, integer, part


def _cost(arguments: Arguments, tokens: int) -> Cost:
    dim = integer(arguments, "dim")
    return Cost(dim * dim + dim, 2 * tokens * dim * dim, 0)


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
)
