"""Spec of the MLP of any ratio (paper.md sections 3 and 4.1)."""

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
from graftc.operators.specs._common import DIM, MLP, integer, number

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu_squared", "quick_gelu", "tanh", "sigmoid")


def hidden_width(dim: int, ratio: float) -> int:
    """Neurons of an MLP: `ratio · dim`, rounded.

    >>> hidden_width(1152, 3)
    3456
    """
    return max(1, round(ratio * dim))


def _cost(arguments: Arguments, tokens: int) -> Cost:
    dim = integer(arguments, "dim")
    hidden = hidden_width(dim, number(arguments, "ratio"))
    maps = 3 if arguments["gated"] else 2
    params = maps * hidden * dim + (maps - 1) * hidden + dim
    return Cost(params, 2 * maps * tokens * dim * hidden, 0)


SPECS = (
    OperatorSpec(
        name="mlp",
        module="graftc.operators.mlp:Mlp",
        summary="linear, activation, linear; gated: a second first linear multiplies",
        roles=(MLP,),
        mixes="channels",
        args=(
            Arg("ratio", "float", required=True, above=0, doc="neurons as a multiple of dim"),
            DIM,
            Arg("activation", "symbol", OfSite("activation"), choices=ACTIVATIONS),
            Arg("gated", "bool", OfSite("gated"), doc="act(gate(x)) · up(x) before the last map"),
        ),
        slots=(
            Slot("up", "fc1"),
            Slot("gate", "gate", when="gated"),
            Slot("down", "fc2", last=True),
        ),
        inits={
            MLP: {WHOLE: Apply("resize", (Part(SITE),), {"by": Const("magnitude")})},
        },
        cost=_cost,
        source="Grafting (arXiv 2506.05340), table 3; gated: arXiv 2002.05202",
    ),
)
