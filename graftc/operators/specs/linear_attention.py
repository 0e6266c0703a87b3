"""Spec of linear attention."""

from __future__ import annotations

from graftc.operators.spec import Arg, Arguments, Cost, OperatorSpec
from graftc.operators.specs._common import (
    SELF_ATTENTION,
    attention_args,
    attention_projections,
    attention_sizes,
    integer,
)
from graftc.operators.specs.attention import COPIES, SLOTS

FEATURES = ("elu1", "relu")


def _cost(arguments: Arguments, tokens: int) -> Cost:
    """The recurrence's cost: φ(k)vᵀ and φ(q)·state, the normaliser being one more column of v."""
    params, projections = attention_projections(arguments, tokens)
    inner, head_dim = attention_sizes(arguments)[0], integer(arguments, "head_dim")
    return Cost(params, 4 * tokens * inner * (head_dim + 1), projections)


SPECS = (
    OperatorSpec(
        name="linear_attention",
        module="graftc.operators.linear_attention:LinearAttention",
        summary="attention with a positive feature map in place of softmax, linear in the tokens",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=(
            Arg("feature", "symbol", "elu1", choices=FEATURES, doc="feature map of q and k"),
            *attention_args(),
        ),
        slots=SLOTS,
        inits=COPIES,
        cost=_cost,
        keeps=("causal", "groups"),
        source="arXiv 2006.16236 (elu + 1); Sana, arXiv 2410.10629 (relu)",
    ),
)
