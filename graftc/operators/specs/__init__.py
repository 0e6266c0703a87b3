"""Every operator as data, one file a family; no torch here.

`SPECS` holds the operators that a rule can name; `MERGES` those of `parallel(…, merge = …)`.

>>> SPECS["hyena_x"].cost({"dim": 1152, "kernel": 4, "order": 2, "dims": 1}, 256).params
5330304
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from graftc.operators.spec import OperatorSpec
from graftc.operators.specs import (
    attention,
    conv,
    hyena,
    linear,
    linear_attention,
    local_2d,
    mamba2,
    mlp,
    norms,
    sliding_window,
    structure,
)
from graftc.operators.specs.merges import MERGES

_FAMILIES = (
    attention, sliding_window, local_2d, linear_attention, mamba2, hyena, conv, mlp, linear, norms,
    structure,
)  # fmt: skip

SPECS: Mapping[str, OperatorSpec] = MappingProxyType(
    {spec.name: spec for family in _FAMILIES for spec in family.SPECS}
)

__all__ = ["MERGES", "SPECS"]
