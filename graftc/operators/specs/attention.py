"""Spec of softmax attention: self-graft, grouped-query, multi-query (paper.md section 4.1)."""

from __future__ import annotations

from graftc.operators.spec import Arguments, Cost, InitSource, OperatorSpec, Slot
from graftc.operators.specs._common import (
    SELF_ATTENTION,
    attention_args,
    attention_projections,
    attention_sizes,
    integer,
    part,
)

SLOTS = (
    Slot("in_proj", "in_proj", doc="rows q, k, v"),
    Slot("q", "in_proj", rows=(0, 3), sizes=attention_sizes),
    Slot("k", "in_proj", rows=(1, 3), sizes=attention_sizes),
    Slot("v", "in_proj", rows=(2, 3), sizes=attention_sizes),
    Slot("out_proj", "out_proj", last=True),
    Slot("out", "out_proj", last=True, doc="the same as out_proj"),
)
"""The slots of every operator with `in_proj` (rows q|k|v) and `out_proj`."""

COPIES: dict[str, dict[str, InitSource]] = {
    SELF_ATTENTION: {
        "q": part("q"),
        "k": part("k"),
        "v": part("v"),
        "out_proj": part("out"),
    }
}
"""The site's own q, k, v, out."""


def dense_attention_flops(arguments: Arguments, tokens: int) -> int:
    """QKᵀ, AV and 2 FLOPs a score.

    >>> dense_attention_flops({"heads": 16, "kv_heads": 16, "head_dim": 72}, 256)
    304087040
    """
    inner, heads = attention_sizes(arguments)[0], integer(arguments, "heads")
    return 4 * tokens * tokens * inner + 2 * heads * tokens * tokens


def _cost(arguments: Arguments, tokens: int) -> Cost:
    params, projections = attention_projections(arguments, tokens)
    return Cost(params, dense_attention_flops(arguments, tokens), projections)


SPECS = (
    OperatorSpec(
        name="attention",
        module="graftc.operators.attention:Attention",
        summary="softmax attention; fewer kv_heads make it grouped-query or multi-query",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=attention_args(),
        slots=SLOTS,
        inits=COPIES,
        cost=_cost,
        keeps=("causal", "groups"),
        source="arXiv 1706.03762; grouped-query: arXiv 2305.13245, section 2",
    ),
)
