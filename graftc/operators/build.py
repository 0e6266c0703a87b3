"""From a spec to the module that computes."""

from __future__ import annotations

import importlib

from torch import nn

from graftc.operators.spec import Arguments, OperatorSpec


def operator_class(spec: OperatorSpec) -> type[nn.Module]:
    """The class that `spec.module` names, or the one of a Python file that was imported for it.

    >>> from graftc.operators.specs import SPECS
    >>> operator_class(SPECS["hyena_x"]).__name__
    'HyenaX'
    """
    file, _, name = spec.module.partition(":")
    found = spec.user.found if spec.user else getattr(importlib.import_module(file), name)
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
    if spec.written is not None:
        from graftc.operators.lowering import lower

        return lower(spec.written, arguments)
    return operator_class(spec)(**arguments)
