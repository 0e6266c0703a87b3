"""Specs of softmax attention: self-graft, grouped-query, multi-query (paper.md section 4.1)."""

from __future__ import annotations

from graftc.operators.spec import (
    WHOLE,
    Apply,
    Arg,
    Arguments,
    Cost,
    InitSource,
    OfSite,
    OperatorSpec,
    Slot,
)
from graftc.operators.specs._common import (
    CROSS_ATTENTION,
    DIM,
    QK_NORM,
    ROTARY,
    SELF_ATTENTION,
    attention_args,
    attention_projections,
    attention_sizes,
    fitted,
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

FITTED: dict[str, dict[str, InitSource]] = {
    SELF_ATTENTION: {**COPIES[SELF_ATTENTION], WHOLE: Apply("least_squares")}
}
"""The site's own, and then v and out fitted: for an attention that weighs its tokens otherwise."""

LINEAR = (SLOTS[3],)
"""Attention is linear in v, row by row."""


def dense_attention_flops(arguments: Arguments, tokens: int) -> int:
    """QKᵀ, AV and 2 FLOPs a score.

    >>> dense_attention_flops({"heads": 16, "kv_heads": 16, "head_dim": 72}, 256)
    304087040
    """
    inner, heads = attention_sizes(arguments)[0], integer(arguments, "heads")
    return 4 * tokens * tokens * inner + 2 * heads * tokens * tokens


def _cost(arguments: Arguments, tokens: int) -> Cost:
    params, projections = attention_projections(arguments, tokens)
    norms = 2 * integer(arguments, "head_dim") if arguments["qk_norm"] != "none" else 0
    return Cost(params + norms, dense_attention_flops(arguments, tokens), projections)


def _cross_cost(arguments: Arguments, tokens: int) -> Cost:
    """`context_tokens`, a fact of the site, is as many as the tokens where it is not known."""
    dim, context = integer(arguments, "dim"), integer(arguments, "context_dim")
    inner, kv, _ = attention_sizes(arguments)
    given = arguments.get("context_tokens")
    keys = given if isinstance(given, int) else tokens
    params = inner * (dim + 1) + 2 * kv * (context + 1) + dim * (inner + 1)
    scores = tokens * keys
    operator = 4 * scores * inner + 2 * integer(arguments, "heads") * scores
    return Cost(params, operator, 4 * tokens * dim * inner + 4 * keys * context * kv)


def _latent_cost(arguments: Arguments, tokens: int) -> Cost:
    dim, rank = integer(arguments, "dim"), integer(arguments, "rank")
    inner = integer(arguments, "heads") * integer(arguments, "head_dim")
    weights = 2 * dim * inner + dim * rank + 2 * rank * inner
    params = weights + inner + 2 * inner + dim
    operator = dense_attention_flops({**arguments, "kv_heads": 1}, tokens)
    return Cost(params, operator, 2 * tokens * weights)


_CROSS = OperatorSpec(
    name="attention",
    module="graftc.operators.attention:CrossAttention",
    summary="softmax attention to a context; fewer kv_heads make it grouped-query",
    roles=(CROSS_ATTENTION,),
    mixes="tokens",
    args=(
        DIM,
        Arg("context_dim", "int", OfSite("context_dim"), minimum=1, doc="width of the context"),
        *(a for a in attention_args() if a.name in ("heads", "kv_heads", "head_dim")),
    ),
    slots=(
        Slot("q", "q_proj"),
        Slot("k", "kv_proj", rows=(0, 2)),
        Slot("v", "kv_proj", rows=(1, 2)),
        Slot("out_proj", "out_proj", last=True),
        Slot("out", "out_proj", last=True, doc="the same as out_proj"),
    ),
    inits={
        CROSS_ATTENTION: {
            "q": part("q"),
            "k": part("k"),
            "v": part("v"),
            "out_proj": part("out"),
        }
    },
    cost=_cross_cost,
    keeps=("mask", "groups", "context"),
    source="arXiv 1706.03762; grouped-query: arXiv 2305.13245, section 2",
)

SPECS = (
    OperatorSpec(
        name="attention",
        module="graftc.operators.attention:Attention",
        summary="softmax attention; fewer kv_heads make it grouped-query or multi-query",
        roles=(SELF_ATTENTION, CROSS_ATTENTION),
        mixes="tokens",
        args=(*attention_args(), ROTARY, QK_NORM),
        slots=(
            *SLOTS,
            Slot("q_norm", "q_norm", when="qk_norm=rms_norm"),
            Slot("k_norm", "k_norm", when="qk_norm=rms_norm"),
        ),
        inits={
            SELF_ATTENTION: {
                **COPIES[SELF_ATTENTION],
                "q_norm": Apply("identity"),
                "k_norm": Apply("identity"),
            }
        },
        cost=_cost,
        keeps=("mask", "rotary", "causal", "groups"),
        source="arXiv 1706.03762; grouped-query: arXiv 2305.13245, section 2",
        variants={CROSS_ATTENTION: _CROSS},
    ),
    OperatorSpec(
        name="latent_attention",
        module="graftc.operators.attention:LatentAttention",
        summary="softmax attention, k and v of all heads from one vector of `rank` numbers a token",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=(
            Arg("rank", "int", required=True, minimum=1, doc="numbers a token that k and v share"),
            *(a for a in attention_args() if a.name != "kv_heads"),
            ROTARY,
        ),
        slots=(
            Slot("q", "q_proj"),
            Slot("kv_down", "kv_down"),
            Slot("kv_up", "kv_up"),
            Slot("out_proj", "out_proj", last=True),
            Slot("out", "out_proj", last=True, doc="the same as out_proj"),
        ),
        inits={
            SELF_ATTENTION: {
                "q": part("q"),
                "kv_down": Apply("random"),
                "kv_up": Apply("random"),
                "out_proj": fitted(part("out")),
            }
        },
        cost=_latent_cost,
        keeps=("mask", "rotary", "causal", "groups"),
        source="DeepSeek-V2, arXiv 2405.04434, section 2.1; from trained weights: TransMLA",
    ),
)
