"""Spec of the depthwise convolution along the tokens."""

from __future__ import annotations

from graftc.operators.spec import Apply, Arg, Arguments, Const, Cost, OperatorSpec, Slot
from graftc.operators.specs._common import DIM, MLP, SELF_ATTENTION, grid_args, integer, taps


def _cost(arguments: Arguments, tokens: int) -> Cost:
    dim, weights = integer(arguments, "dim"), taps(arguments)
    return Cost(dim * (weights + 1), 2 * weights * tokens * dim, 0)


_OWN = {"filter": Apply("argument", (Const("init"),))}

SPECS = (
    OperatorSpec(
        name="depthwise_conv",
        module="graftc.operators.conv:DepthwiseConv",
        summary="one filter a channel, along the tokens",
        roles=(SELF_ATTENTION, MLP),
        mixes="tokens",
        args=(
            DIM,
            Arg("kernel", "int", required=True, minimum=1, doc="taps"),
            Arg("causal", "bool", False, doc="taps on earlier tokens only"),
            Arg("init", "symbol", "identity", choices=("identity", "zero", "random")),
            *grid_args(),
        ),
        slots=(Slot("filter", "filter"),),
        inits={SELF_ATTENTION: _OWN, MLP: _OWN},
        cost=_cost,
        keeps=("causal",),
        length="dims=2",
        source="PCT-Net (MIS-FM), a convolution beside attention",
    ),
)
