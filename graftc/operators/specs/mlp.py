"""Specs of the MLP of any ratio (paper.md sections 3 and 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

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
from graftc.operators.specs._common import DIM, MLP, fitted, integer, number

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


def _hyena_cost(arguments: Arguments, tokens: int) -> Cost:
    """The gating is the operator; the projections and the convolution are its featurisers."""
    dim, kernel = integer(arguments, "dim"), integer(arguments, "kernel")
    hidden = hidden_width(dim, number(arguments, "ratio"))
    params = 3 * hidden * (dim + 1) + dim * (hidden + 1)
    params += integer(arguments, "tokens") * (kernel + 1)
    featuriser = 8 * tokens * dim * hidden + 2 * kernel * 3 * hidden * tokens
    return Cost(params, 2 * tokens * hidden, featuriser)


def _fitted(arguments: Arguments, facts: Mapping[str, object]) -> tuple[str, ...]:
    """The last map of a narrower MLP makes up for the neurons that are gone (docs/first-weights.md).

    >>> _fitted({"dim": 8, "ratio": 3}, {"hidden": 32}), _fitted({"dim": 8, "ratio": 6}, {"hidden": 32})
    (('down',), ())
    """
    hidden = facts.get("hidden")
    kept = hidden_width(integer(arguments, "dim"), number(arguments, "ratio"))
    return ("down",) if isinstance(hidden, int) and kept < hidden else ()


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
        fitted=_fitted,
        cost=_cost,
        source="Grafting (arXiv 2506.05340), table 3; gated: arXiv 2002.05202",
    ),
    OperatorSpec(
        name="mlp_hyena_x",
        module="graftc.operators.mlp:MlpHyenaX",
        summary="out(q · (k · v)), a convolution along the channels of each token",
        roles=(MLP,),
        mixes="channels",
        args=(
            DIM,
            Arg(
                "tokens", "int", OfSite("tokens"), minimum=1, doc="the token count it is built for"
            ),
            Arg("ratio", "float", 2, above=0, doc="width of q, k and v as a multiple of dim"),
            Arg("kernel", "int", 4, minimum=1, doc="taps along the channels"),
        ),
        slots=(
            Slot("in_proj", "in_proj", doc="rows q, k, v"),
            Slot("q", "in_proj", rows=(0, 3)),
            Slot("k", "in_proj", rows=(1, 3)),
            Slot("v", "in_proj", rows=(2, 3)),
            Slot("short_filter", "short_filter", doc="one filter for each token position"),
            Slot("out_proj", "out_proj", last=True),
        ),
        inits={
            MLP: {
                "in_proj": Apply("random"),
                "short_filter": Apply("identity", options={"causal": Const(True)}),
                "out_proj": fitted(Apply("random")),
            }
        },
        cost=_hyena_cost,
        length="fixed",
        source="Grafting (arXiv 2506.05340), table 3",
    ),
)
