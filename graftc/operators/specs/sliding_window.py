"""Spec of sliding-window attention (paper.md sections 3 and 4.1)."""

from __future__ import annotations

from graftc.operators.spec import Arg, Arguments, Cost, OperatorSpec
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


def _form(arguments: Arguments, tokens: int | None) -> str:
    """Dense where there are hardly more tokens than a block of queries sees: cutting costs more than it spares.

    Measured on a CPU, in eager mode and in ONNX Runtime (`benchmarks/operators.py --forms`).

    >>> _form({"window": 4, "causal": False}, 64), _form({"window": 4, "causal": False}, 256)
    ('dense', 'blocks')
    """
    window = integer(arguments, "window")
    seen = max(window, 16) + (1 if arguments["causal"] else 2) * window
    return "dense" if tokens is not None and tokens < seen + 112 else "blocks"


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
            form_arg("blocks", "dense"),
            *QK_NORM,
            SCALE,
            SOFTCAP,
        ),
        slots=SLOTS,
        inits=FITTED,
        cost=_cost,
        keeps=("mask", "rotary", "causal", "groups"),
        linear=LINEAR,
        form=_form,
        source="Grafting (arXiv 2506.05340), table 3; arXiv 2004.05150",
    ),
)
