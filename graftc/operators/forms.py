"""Which of several forms of one function: by target, device, dtype and length, or as a rule says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from graftc.operators.spec import Arguments, Form, Machine, OperatorSpec

Agrees = Callable[[OperatorSpec, Form, Arguments, Machine], "str | None"]
"""None where an installed kernel was run on the machine's device and agrees, else why it cannot be said that it does."""


@dataclass(frozen=True)
class Choice:
    """The form that was taken, and why; `forced`: a rule says it."""

    form: str
    why: str
    forced: bool = False


def choose(
    spec: OperatorSpec,
    arguments: Arguments,
    machine: Machine,
    tokens: object = None,
    agrees: Agrees | None = None,
) -> Choice | None:
    """The form of an operator with these arguments; None for one that has no forms.

    An installed kernel is taken unasked only where `agrees` says so; by default it is run beside the operator's own
    form on the device (`graftc.operators.agreement`).

    >>> from graftc.operators.specs import SPECS
    >>> window = {"window": 4, "causal": False, "head_dim": 64, "form": "auto"}
    >>> choose(SPECS["sliding_window"], window, Machine("cuda"), 4096)
    Choice(form='flex', why='FlexAttention, one kernel on a GPU', forced=False)
    """
    if not spec.forms or "form" not in arguments:
        return None
    if arguments["form"] != "auto":
        return Choice(str(arguments["form"]), "the rule says so", forced=True)
    count = tokens if isinstance(tokens, int) else None
    passed: list[str] = []
    for form in spec.forms:
        why = form.wanted(arguments, machine, count)
        if why is None:
            continue
        instead = form.cannot(arguments)
        if instead is None and form.package is not None:
            instead = (agrees or _by_running)(spec, form, arguments, machine)
        if instead is None:
            return Choice(form.name, "; ".join([why, *passed]))
        passed.append(f"not {form.name}: {instead}")
    raise ValueError(f"{spec.name} has no form for {machine}")


def missing(form: Form) -> str | None:
    """The package that a form needs and that is not installed here, by the name that installs it.

    >>> missing(Form("x", lambda *_: None, package=("no_such_package", "no-such")))
    'no-such'
    """
    if form.package is None or importlib.util.find_spec(form.package[0]) is not None:
        return None
    return form.package[1]


def _by_running(
    spec: OperatorSpec, form: Form, arguments: Arguments, machine: Machine
) -> str | None:
    if (absent := missing(form)) is not None:
        return f"{absent} is not installed here"
    from graftc.operators.agreement import disagreement

    return disagreement(spec, form, arguments, machine)
