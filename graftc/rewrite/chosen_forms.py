"""The form of a new operator at a site: chosen by where the student is to run, or the rule's, checked."""

from __future__ import annotations

from collections.abc import Mapping

from graftc.diagnostics import fail
from graftc.language.rules import OperatorCall
from graftc.operators.forms import Choice, choose, missing
from graftc.operators.spec import Machine, Value
from graftc.program.analysis import Site


def chosen(
    call: OperatorCall, arguments: Mapping[str, Value], site: Site, machine: Machine
) -> tuple[Mapping[str, Value], Choice | None]:
    """The arguments with a form, and why it is that one. Raises GraftError for a rule's form that cannot be there."""
    choice = choose(call.spec, arguments, machine, site.facts.get("tokens"))
    if choice is None:
        return arguments, None
    if choice.forced:
        _check_forced(call, arguments, site)
    return {**arguments, "form": choice.form}, choice


def _check_forced(call: OperatorCall, arguments: Mapping[str, Value], site: Site) -> None:
    form = call.spec.form(arguments["form"])
    assert form is not None  # `choices` of the argument says which there are
    span = call.arguments["form"].span
    if (why := form.cannot(arguments)) is not None:
        fail(
            "G820",
            f"`{call.spec.name}` has no form `{form.name}` with these arguments: {why}",
            span=span,
            site=site.path,
            help="leave `form` out, or write "
            + " or ".join(f.name for f in call.spec.forms if f.cannot(arguments) is None),
        )
    if (package := missing(form)) is not None:
        fail(
            "G821",
            f"`form = {form.name}` of `{call.spec.name}` needs the package `{package}`, which is not installed here",
            span=span,
            site=site.path,
            wanted=f"`import {form.package[0]}`" if form.package else None,
            help=f"pip install {package}, or leave `form` out",
        )
