"""Specs of linear attention, and of its hybrid with a window."""

from __future__ import annotations

from graftc.operators.spec import (
    Apply,
    Arg,
    Arguments,
    Const,
    Cost,
    Form,
    Machine,
    OperatorSpec,
    Slot,
)
from graftc.operators.specs._common import (
    QK_NORM,
    ROTARY,
    SCALE,
    SELF_ATTENTION,
    SOFTCAP,
    attention_args,
    attention_projections,
    attention_sizes,
    form_arg,
    integer,
    norm_params,
    on_gpu,
    otherwise,
)
from graftc.operators.specs.attention import COPIES, FITTED, LINEAR, SLOTS

_PAIR = "feature=softmax_pair"
_FEATURES = Arg(
    "features",
    "int",
    minimum=1,
    when=_PAIR,
    doc="half of the width of φ; a head's width if not given",
)
_MAPS = (
    Slot("feature_q", "feature_q", when=_PAIR, doc="W of φ for q, [heads, head_dim, features]"),
    Slot("feature_k", "feature_k", when=_PAIR, doc="W of φ for k, [kv_heads, head_dim, features]"),
)
_MAP_INITS = {"feature_q": Apply("random"), "feature_k": Apply("random")}


def _width(arguments: Arguments) -> tuple[int, int]:
    """(features of φ, parameters of the learned maps)."""
    head_dim = integer(arguments, "head_dim")
    if arguments["feature"] != "softmax_pair":
        return head_dim, 0
    features = arguments["features"]
    half = features if isinstance(features, int) else head_dim
    maps = integer(arguments, "heads") + integer(arguments, "kv_heads")
    return 2 * half, maps * head_dim * half


def _cost(arguments: Arguments, tokens: int) -> Cost:
    """The recurrence's cost: φ(k)vᵀ and φ(q)·state, the normaliser being one more column of v."""
    params, projections = attention_projections(arguments, tokens)
    width, maps = _width(arguments)
    columns = integer(arguments, "head_dim") + 1
    operator = 4 * tokens * integer(arguments, "heads") * width * columns
    return Cost(params + maps + norm_params(arguments), operator, projections + 2 * tokens * maps)


def _window_cost(arguments: Arguments, tokens: int) -> Cost:
    """Softmax over two blocks (three where not causal), linear attention for the rest."""
    linear = _cost(arguments, tokens)
    inner, heads = attention_sizes(arguments)[0], integer(arguments, "heads")
    seen = (2 if arguments["causal"] else 3) * integer(arguments, "window")
    scores = tokens * min(tokens, seen)
    operator = linear.operator_flops + 4 * scores * inner + 2 * heads * scores
    return Cost(linear.params + heads, operator, linear.featuriser_flops)


def _causal_on_gpu(arguments: Arguments, machine: Machine, tokens: int | None) -> str | None:
    why = on_gpu("flash-linear-attention's kernel, which agrees here")
    return why(arguments, machine, tokens) if arguments["causal"] else None


SPECS = (
    OperatorSpec(
        name="linear_attention",
        module="graftc.operators.linear_attention:LinearAttention",
        summary="attention with a positive feature map in place of softmax, linear in the tokens",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=(
            Arg(
                "feature",
                "symbol",
                "elu1",
                choices=("elu1", "relu", "softmax_pair"),
                doc="feature map of q and k",
            ),
            _FEATURES,
            *attention_args(),
            ROTARY,
            *QK_NORM,
            form_arg("products", "fla"),
        ),
        slots=(*SLOTS, *_MAPS),
        inits={SELF_ATTENTION: {**FITTED[SELF_ATTENTION], **_MAP_INITS}},
        cost=_cost,
        keeps=("key_mask", "rotary", "causal", "groups"),
        linear=LINEAR,
        groups={"feature_maps": ("feature_q", "feature_k")},
        forms=(
            Form(
                "fla",
                _causal_on_gpu,
                cannot=lambda arguments: (
                    None
                    if arguments["causal"]
                    else "flash-linear-attention's kernel is a causal sum, and this is not causal"
                ),
                module="graftc.operators.kernels:KernelLinearAttention",
                package=("fla", "flash-linear-attention"),
            ),
            Form("products", otherwise("plain products, in chunks where causal")),
        ),
        source="arXiv 2006.16236 (elu + 1); Sana, arXiv 2410.10629 (relu); Hedgehog, arXiv 2402.04347",
    ),
    OperatorSpec(
        name="linear_window_attention",
        module="graftc.operators.linear_attention:LinearWindowAttention",
        summary="softmax in a window, linear attention outside it, one normaliser",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=(
            Arg("window", "int", required=True, minimum=1, doc="tokens of a block"),
            Arg(
                "feature",
                "symbol",
                "softmax_pair",
                choices=("elu1", "relu", "softmax_pair"),
                doc="feature map of q and k",
            ),
            _FEATURES,
            Arg("start", "float", -2.197, doc="the window's share at first, before its sigmoid"),
            *attention_args(),
            ROTARY,
            *QK_NORM,
            SCALE,
            SOFTCAP,
        ),
        slots=(*SLOTS, *_MAPS, Slot("factor", "", parameter="factor", doc="the window's share")),
        inits={
            SELF_ATTENTION: {
                **COPIES[SELF_ATTENTION],
                **_MAP_INITS,
                "factor": Apply("constant", (Const("start"),)),
            }
        },
        cost=_window_cost,
        keeps=("key_mask", "rotary", "causal", "groups"),
        groups={"feature_maps": ("feature_q", "feature_k", "factor")},
        source="LoLCATs, arXiv 2410.10254",
    ),
)
