"""From a spec to the module that computes."""

from __future__ import annotations

import importlib

from torch import nn

from graftc.operators.parallel import BlockSumMerge, LerpMerge, LinearMerge, SumMerge
from graftc.operators.spec import Arguments, OperatorSpec
from graftc.operators.specs import MERGES
from graftc.operators.specs._common import number
from graftc.operators.specs.merges import BLOCK


def operator_class(spec: OperatorSpec) -> type[nn.Module]:
    """The class that `spec.module` names.

    >>> from graftc.operators.specs import SPECS
    >>> operator_class(SPECS["hyena_x"]).__name__
    'HyenaX'
    """
    file, _, name = spec.module.partition(":")
    found = getattr(importlib.import_module(file), name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(f"{spec.module} of operator {spec.name} is not an nn.Module class")
    return found


def build(spec: OperatorSpec, arguments: Arguments) -> nn.Module:
    """The operator of `spec` with its resolved arguments; ValueError where they do not fit.

    Under `torch.device("meta")` no weights are made.

    >>> from graftc.operators.specs import SPECS
    >>> module = build(SPECS["hyena_x"], {"dim": 8, "kernel": 4, "causal": True})
    >>> sum(p.numel() for p in module.parameters())
    408
    """
    return operator_class(spec)(**arguments)


def build_merge(merge: str, role: str, dim: int, branches: int, start: float = 0.5) -> nn.Module:
    """The merge of `parallel(…, merge = …)` for branches of role `block` or `site`.

    >>> build_merge("sum", "block", dim=8, branches=2)
    BlockSumMerge()
    """
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}, wanted {', '.join(MERGES)}")
    if merge == "linear":
        return LinearMerge(dim, branches)
    if merge == "lerp":
        if branches != 2:
            raise ValueError(f"merge = lerp: {branches} branches, wanted 2")
        return LerpMerge(number({"start": start}, "start"))
    return BlockSumMerge() if role == BLOCK else SumMerge()
