"""From a spec to the module that computes."""

from __future__ import annotations

import importlib

from torch import nn

from graftc.operators.forms import choose
from graftc.operators.spec import CPU, Arguments, Machine, OfSite, OperatorSpec, Value, holds


def operator_class(spec: OperatorSpec, arguments: Arguments | None = None) -> type[nn.Module]:
    """The class that `spec` names for these arguments, or the one of a Python file that was imported for it.

    >>> from graftc.operators.specs import SPECS
    >>> operator_class(SPECS["hyena_x"]).__name__
    'HyenaX'
    """
    module = spec.module_of(arguments or {})
    file, _, name = module.partition(":")
    found = spec.user.found if spec.user else getattr(importlib.import_module(file), name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(f"{module} of operator {spec.name} is not an nn.Module class")
    return found


def arguments_at(
    spec: OperatorSpec, facts: Arguments, given: Arguments, machine: Machine = CPU
) -> dict[str, Value]:
    """All arguments of an operator at a site of these facts, `given` ones first; ValueError where one is missing.

    What a rule does with a span for each error (`graftc.rewrite.arguments`), for programs that build an operator.

    >>> from graftc.operators.specs import SPECS
    >>> site = {"dim": 8, "tokens": 64}
    >>> arguments_at(SPECS["hyena_x"], site, {"causal": False})
    {'dim': 8, 'kernel': 4, 'causal': False, 'order': 2, 'dims': 1, 'height': None, 'width': None, 'form': 'conv'}
    """
    unknown = given.keys() - {a.name for a in spec.args}
    if unknown:
        raise ValueError(f"{spec.name}: no argument {', '.join(sorted(unknown))}")
    made: dict[str, Value] = {}
    for a in spec.args:
        value = a.default
        if not holds(a.when, made):
            value = None
        elif a.name in given:
            value = given[a.name]
        elif isinstance(value, OfSite):
            value = facts.get(value.fact, value.otherwise)
            if value is None and not (isinstance(a.default, OfSite) and a.default.optional):
                raise ValueError(f"{spec.name}: the site has no {a.name}")
        elif a.required:
            raise ValueError(f"{spec.name}: {a.name} is not given")
        made[a.name] = value  # type: ignore[assignment]
    if (choice := choose(spec, made, machine, facts.get("tokens"))) is not None:
        made["form"] = choice.form
    return made


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
    return operator_class(spec, arguments)(**arguments)
