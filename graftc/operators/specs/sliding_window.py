"""Spec of sliding-window attention (paper.md sections 3 and 4.1)."""

from __future__ import annotations

from graftc.operators.spec import Arg, Arguments, Cost, Form, Machine, OperatorSpec
from graftc.operators.specs._common import (
    QK_NORM,
    ROTARY,
    SCALE,
    SELF_ATTENTION,
    SOFTCAP,
    attention_args,
    attention_projections,
    attention_sizes,
    flex_form,
    form_arg,
    integer,
    norm_params,
    otherwise,
)
from graftc.operators.specs.attention import FITTED, LINEAR, SLOTS


def _cost(arguments: Arguments, tokens: int) -> Cost:
    params, projections = attention_projections(arguments, tokens)
    window = integer(arguments, "window")
    seen = min(tokens, (1 if arguments["causal"] else 2) * window + 1)
    scores = tokens * seen
    inner, heads = attention_sizes(arguments)[0], integer(arguments, "heads")
    return Cost(
        params + norm_params(arguments), 4 * scores * inner + 2 * heads * scores, projections
    )


def _dense(arguments: Arguments, machine: Machine, tokens: int | None) -> str | None:
    """Dense where there are hardly more tokens than a block of queries sees: cutting costs more than it spares.

    Measured on a CPU, in eager mode and in ONNX Runtime (`benchmarks/operators.py --forms`).

    >>> from graftc.operators.spec import CPU
    >>> _dense({"window": 4, "causal": False}, CPU, 64)
    'few tokens: at most 135'
    """
    window = integer(arguments, "window")
    most = max(window, 16) + (1 if arguments["causal"] else 2) * window + 111
    return f"few tokens: at most {most}" if tokens is not None and tokens <= most else None


_FORMS = (
    Form("dense", _dense),
    flex_form("FlexWindow"),
    Form("blocks", otherwise("blocks of queries, whatever the length")),
)

SPECS = (
    OperatorSpec(
        name="sliding_window",
        module="graftc.operators.sliding_window:SlidingWindow",
        summary="softmax attention to the tokens at most `window` away",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=(
            Arg("window", "int", required=True, minimum=1, doc="tokens seen to each side"),
            *attention_args(),
            ROTARY,
            form_arg("blocks", "dense", "flex"),
            *QK_NORM,
            SCALE,
            SOFTCAP,
        ),
        slots=SLOTS,
        inits=FITTED,
        cost=_cost,
        keeps=("mask", "rotary", "causal", "groups"),
        linear=LINEAR,
        forms=_FORMS,
        source="Grafting (arXiv 2506.05340), table 3; arXiv 2004.05150",
    ),
)
