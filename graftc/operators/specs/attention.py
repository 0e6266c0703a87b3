"""Specs of softmax attention: self-graft, grouped-query, multi-query (paper.md section 4.1)."""

from __future__ import annotations

from dataclasses import replace

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
    JOINT_ATTENTION,
    QK_NORM,
    QK_NORM_INITS,
    QK_NORM_SLOTS,
    ROTARY,
    SCALE,
    SELF_ATTENTION,
    SOFTCAP,
    attention_args,
    attention_projections,
    attention_sizes,
    integer,
    norm_params,
    norm_slots,
    own_or_one,
    part,
)

SLOTS = (
    Slot("in_proj", "in_proj", doc="rows q, k, v"),
    Slot("q", "in_proj", rows=(0, 3), sizes=attention_sizes),
    Slot("k", "in_proj", rows=(1, 3), sizes=attention_sizes),
    Slot("v", "in_proj", rows=(2, 3), sizes=attention_sizes),
    Slot("out_proj", "out_proj", last=True),
    Slot("out", "out_proj", last=True, doc="the same as out_proj"),
    *QK_NORM_SLOTS,
)
"""The slots of every operator with `in_proj` (rows q|k|v) and `out_proj`."""

COPIES: dict[str, dict[str, InitSource]] = {
    SELF_ATTENTION: {
        "q": part("q"),
        "k": part("k"),
        "v": part("v"),
        "out_proj": part("out"),
        **QK_NORM_INITS,
    }
}
"""The site's own q, k, v, out, and norms of q and k."""

FITTED: dict[str, dict[str, InitSource]] = {
    SELF_ATTENTION: {**COPIES[SELF_ATTENTION], WHOLE: Apply("least_squares")}
}
"""The site's own, and then v and out fitted: for an attention that weighs its tokens otherwise."""

_OUT = (
    Arg("out", "bool", OfSite("out", True, optional=True), doc="a linear map follows"),
    Arg(
        "out_dim",
        "int",
        OfSite("out_dim", None, optional=True),
        minimum=1,
        when="out",
        doc="features that the last map gives; dim if not given and not the site's own",
    ),
    Arg(
        "tokens_first",
        "bool",
        OfSite("tokens_first", False, optional=True),
        doc="the streams are [tokens, batch, features]",
    ),
)
_SLOTS = tuple(replace(s, when="out") if s.module == "out_proj" else s for s in SLOTS)

LINEAR = (SLOTS[3],)
"""Attention is linear in v, row by row."""

_KEYS_AND_VALUES = Apply("concat", (part("k"), part("v")))


def dense_attention_flops(arguments: Arguments, tokens: int) -> int:
    """QKᵀ, AV and 2 FLOPs a score.

    >>> dense_attention_flops({"heads": 16, "kv_heads": 16, "head_dim": 72}, 256)
    304087040
    """
    inner, heads = attention_sizes(arguments)[0], integer(arguments, "heads")
    return 4 * tokens * tokens * inner + 2 * heads * tokens * tokens


def _of_last_map(arguments: Arguments, queries: int) -> tuple[int, int]:
    """(parameters, FLOPs) that an operator with another last map, or none, has more."""
    dim, inner = integer(arguments, "dim"), attention_sizes(arguments)[0]
    given = arguments.get("out_dim")
    wide = given if isinstance(given, int) else dim
    more = (0 if arguments.get("out") is False else wide) - dim
    return more * (inner + 1), 2 * queries * more * inner


def _cost(arguments: Arguments, tokens: int) -> Cost:
    params, projections = attention_projections(arguments, tokens)
    less, fewer = _of_last_map(arguments, tokens)
    return Cost(
        params + less + norm_params(arguments),
        dense_attention_flops(arguments, tokens),
        projections + fewer,
    )


def _cross_cost(arguments: Arguments, tokens: int) -> Cost:
    """`context_tokens`, a fact of the site, is as many as the tokens where it is not known."""
    dim, context = integer(arguments, "dim"), integer(arguments, "context_dim")
    inner, kv, _ = attention_sizes(arguments)
    given = arguments.get("context_tokens")
    keys = given if isinstance(given, int) else tokens
    params = inner * (dim + 1) + 2 * kv * (context + 1) + dim * (inner + 1) + norm_params(arguments)
    less, fewer = _of_last_map(arguments, tokens)
    scores = tokens * keys
    operator = 4 * scores * inner + 2 * integer(arguments, "heads") * scores
    featuriser = 4 * tokens * dim * inner + 4 * keys * context * kv
    return Cost(params + less, operator, featuriser + fewer)


def _joint_cost(arguments: Arguments, tokens: int) -> Cost:
    """`context_tokens`, a fact of the site, is as many as the tokens where it is not known."""
    dim, context = integer(arguments, "dim"), integer(arguments, "context_dim")
    inner, rows = attention_sizes(arguments)[0], sum(attention_sizes(arguments))
    given, second = arguments.get("context_tokens"), arguments["second"]
    others = given if isinstance(given, int) else tokens
    params = rows * (dim + 1) + dim * (inner + 1) + norm_params(arguments)
    if second != "shared":
        params += rows * (context + 1) + norm_params(arguments)
    params += context * (inner + 1) if second == "own" else 0
    last = 0 if second == "hidden" else inner
    featuriser = 2 * tokens * dim * (rows + inner) + 2 * others * context * (rows + last)
    return Cost(params, dense_attention_flops(arguments, tokens + others), featuriser)


def _latent_cost(arguments: Arguments, tokens: int) -> Cost:
    dim, rank = integer(arguments, "dim"), integer(arguments, "rank")
    inner = integer(arguments, "heads") * integer(arguments, "head_dim")
    weights = 2 * dim * inner + dim * rank + 2 * rank * inner
    params = weights + inner + 2 * inner + dim + norm_params({**arguments, "kv_heads": None})
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
        ROTARY,
        *QK_NORM,
        SCALE,
        SOFTCAP,
        *_OUT,
    ),
    slots=(
        Slot("q", "q_proj"),
        Slot("k", "kv_proj", rows=(0, 2)),
        Slot("v", "kv_proj", rows=(1, 2)),
        Slot("out_proj", "out_proj", last=True, when="out"),
        Slot("out", "out_proj", last=True, when="out", doc="the same as out_proj"),
        *QK_NORM_SLOTS,
    ),
    inits={
        CROSS_ATTENTION: {
            "q": part("q"),
            "k": part("k"),
            "v": part("v"),
            "out_proj": part("out"),
            **QK_NORM_INITS,
        }
    },
    cost=_cross_cost,
    keeps=("mask", "rotary", "groups", "context"),
    source="arXiv 1706.03762; grouped-query: arXiv 2305.13245, section 2",
)

_APART = "second!=shared"
_NAMES = ("q", "k", "v")
_JOINT = OperatorSpec(
    name="attention",
    module="graftc.operators.joint:JointAttention",
    summary="softmax attention of two streams to each other and themselves",
    roles=(JOINT_ATTENTION,),
    mixes="tokens",
    args=(
        DIM,
        Arg(
            "context_dim", "int", OfSite("context_dim"), minimum=1, doc="width of the second stream"
        ),
        *(a for a in attention_args() if a.name in ("heads", "kv_heads", "head_dim")),
        Arg(
            "second",
            "symbol",
            OfSite("second"),
            choices=("own", "hidden", "shared"),
            doc="maps of its own, in and out; not returned; the first stream's maps",
        ),
        Arg("swapped", "bool", OfSite("swapped"), doc="the second stream's tokens come first"),
        ROTARY,
        *QK_NORM,
        SCALE,
        SOFTCAP,
    ),
    slots=(
        *(
            Slot(f"{n}_1", "in_proj", rows=(i, 3), sizes=attention_sizes)
            for i, n in enumerate(_NAMES)
        ),
        *(
            Slot(f"{n}_2", "in_proj_2", rows=(i, 3), sizes=attention_sizes, when=_APART)
            for i, n in enumerate(_NAMES)
        ),
        *QK_NORM_SLOTS,
        *norm_slots("q_norm_2", "k_norm_2", when=f"norm_affine and {_APART}"),
        Slot("out_1", "out_proj", last=True),
        Slot("out_2", "out_proj_2", when="second=own"),
    ),
    inits={
        JOINT_ATTENTION: {
            **{f"{n}_{s}": part(f"{n}_{s}") for n in (*_NAMES, "out") for s in (1, 2)},
            **{f"{n}_norm": own_or_one(f"{n}_norm_1") for n in ("q", "k")},
            **{f"{n}_norm_2": own_or_one(f"{n}_norm_2") for n in ("q", "k")},
        }
    },
    cost=_joint_cost,
    keeps=("mask", "rotary", "groups", "context"),
    source="SD3, arXiv 2403.03206, section 4",
)

SPECS = (
    OperatorSpec(
        name="attention",
        module="graftc.operators.attention:Attention",
        summary="softmax attention; fewer kv_heads make it grouped-query or multi-query",
        roles=(SELF_ATTENTION, CROSS_ATTENTION, JOINT_ATTENTION),
        mixes="tokens",
        args=(*attention_args(), ROTARY, *QK_NORM, SCALE, SOFTCAP, *_OUT),
        slots=_SLOTS,
        inits=COPIES,
        cost=_cost,
        keeps=("mask", "rotary", "causal", "groups"),
        source="arXiv 1706.03762; grouped-query: arXiv 2305.13245, section 2",
        variants={CROSS_ATTENTION: _CROSS, JOINT_ATTENTION: _JOINT},
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
            *QK_NORM,
            SCALE,
            SOFTCAP,
        ),
        slots=(
            Slot("q", "q_proj"),
            Slot("kv_down", "kv_down"),
            Slot("kv_up", "kv_up", doc="rows k, v"),
            Slot("out_proj", "out_proj", last=True),
            Slot("out", "out_proj", last=True, doc="the same as out_proj"),
            *QK_NORM_SLOTS,
        ),
        inits={
            SELF_ATTENTION: {
                **QK_NORM_INITS,
                "q": part("q"),
                "kv_down": Apply("svd_inner", (_KEYS_AND_VALUES,)),
                "kv_up": Apply("svd_outer", (_KEYS_AND_VALUES,)),
                "out_proj": part("out"),
                WHOLE: Apply("least_squares"),
            }
        },
        cost=_latent_cost,
        keeps=("mask", "rotary", "causal", "groups"),
        linear=(Slot("v", "kv_up", rows=(1, 2)),),
        source="DeepSeek-V2, arXiv 2405.04434, section 2.1; from trained weights: TransMLA",
    ),
)
