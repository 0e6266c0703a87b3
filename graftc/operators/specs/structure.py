"""Specs of the operators that compute nothing: the identity and zero."""

from __future__ import annotations

from graftc.operators.spec import Arguments, Cost, OperatorSpec
from graftc.operators.specs._common import MLP, SELF_ATTENTION


def _free(arguments: Arguments, tokens: int) -> Cost:
    return Cost(0, 0, 0)


def _spec(name: str, cls: str, summary: str) -> OperatorSpec:
    return OperatorSpec(
        name=name,
        module=f"graftc.operators.structure:{cls}",
        summary=summary,
        roles=(SELF_ATTENTION, MLP),
        mixes="nothing",
        args=(),
        slots=(),
        inits={SELF_ATTENTION: {}, MLP: {}},
        cost=_free,
    )


SPECS = (
    _spec("identity", "Identity", "gives its input back"),
    _spec("zero", "Zero", "gives zeros: the branch contributes nothing"),
)
