"""What a plan says of the forms of its operators."""

from __future__ import annotations

from collections.abc import Iterable

from graftc.diagnostics import Diagnostic
from graftc.operators.agreement import disagreement
from graftc.operators.spec import Machine
from graftc.rewrite.edits import Edit, NewModule


def form_notes(edits: Iterable[Edit], machine: Machine) -> Iterable[Diagnostic]:
    """A warning for each installed kernel that a rule asks for and that was not seen to agree on this machine."""
    said: set[str] = set()
    for new in (n for e in edits for n in (*e.new, *e.candidates) if n is not None):
        form = new.spec.form(new.arguments.get("form"))
        if new.choice is None or not new.choice.forced or form is None or form.package is None:
            continue
        why = disagreement(new.spec, form, new.arguments, Machine("cuda", machine.dtype))
        if why is not None and why not in said:
            said.add(why)
            yield Diagnostic(
                "G822",
                f"`form = {form.name}` of `{new.spec.name}` was not seen to agree with `{new.spec.forms[-1].name}`",
                site=new.site.path,
                found=why,
                help="compile on a machine with the GPU and the package, or leave `form` out",
                severity="warning",
            )


def form_texts(edits: Iterable[Edit]) -> list[str]:
    """A line for each form that was chosen, with its reason and how many sites have it."""
    counts: dict[str, int] = {}
    for new in (n for e in edits for n in e.new):
        if new.choice is not None:
            text = f"`{new.spec.name}` is computed as {new.choice.form}: {new.choice.why}"
            counts[text] = counts.get(text, 0) + 1
    return [f"{text} ({n} site{'s' * (n > 1)})" for text, n in counts.items()]


def form_dict(new: NewModule) -> dict[str, str]:
    """A form for YAML and JSON."""
    assert new.choice is not None
    return {"module": new.path, "form": new.choice.form, "why": new.choice.why}
