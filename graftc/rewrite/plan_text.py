"""The plan as plain data, and an edit in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.language.rules import Rewrite
from graftc.operators.spec import Arg, OfSite, Value
from graftc.program.measured import MeasuredOn
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.form_texts import form_dict
from graftc.rewrite.inputs import own_facts
from graftc.rewrite.measured import Listing
from graftc.rewrite.plan import Plan
from graftc.rewrite.price import Candidate, Step


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data for YAML and JSON."""
    m = plan.machine
    return {
        "version": 1,
        "machine": {"device": m.device, "dtype": m.dtype, "to": m.to},
        "edits": [_step_dict(s) for s in plan.steps],
        "filtered": [
            {"rule": m.rule.name, "path": f.path, "reason": f.reason}
            for m in plan.selections
            for f in m.filtered
        ],
        **_measured_dict(plan),
        "checks": list(plan.checks),
        "totals": {
            "parameters": {"before": plan.parameters[0], "after": plan.parameters[1]},
            "flops": {"before": plan.flops[0], "after": plan.flops[1]},
        },
        "chains": list(plan.chains),
    }


def _measured_dict(plan: Plan) -> dict[str, Any]:
    """What measured selectors chose by; nothing where the file has none."""
    on = plan.measured
    if on is None:
        return {}
    return {
        "measured": {
            **measured_on_dict(on),
            "selectors": [
                {
                    "rule": m.rule.name,
                    "selector": one.selector,
                    "chosen": [{"path": p, "value": v} for p, v in one.chosen],
                    "not_chosen": [{"path": p, "value": v} for p, v in one.others],
                }
                for m in plan.selections
                for one in m.measured
            ],
        }
    }


def measured_on_dict(on: MeasuredOn) -> dict[str, Any]:
    """What measures were made on, for YAML and JSON."""
    return {
        "samples": on.samples,
        "seed": on.seed,
        "data": on.data,
        "task": on.task,
        "read_from_cache": list(on.cached),
        "cache": on.cache,
    }


def measured_on_text(on: MeasuredOn) -> str:
    """What measures were made on, in a line."""
    kept = f"; {', '.join(on.cached)} read from {on.cache}" if on.cached else ""
    return f"measured on {on.samples} samples of {on.data}, task {on.task}, seed {on.seed}{kept}"


def listing_lines(listing: Listing) -> list[str]:
    """The values of a measured selector: what was chosen, the largest first, then the rest."""

    def line(word: str, pairs: tuple[tuple[str, float], ...]) -> list[str]:
        ranked = sorted(pairs, key=lambda p: -p[1])
        said = ", ".join(f"{path} {value:.4g}" for path, value in ranked)
        return [f"  {word}: {said}"] if pairs else []

    return [*line("chosen", listing.chosen), *line("not chosen", listing.others)]


def _step_dict(step: Step) -> dict[str, Any]:
    edit = step.edit
    return {
        "site": edit.name,
        "sites": [s.path for s in edit.sites] or edit.name.split("+"),
        "rule": edit.rule.name,
        "origin": edit.origin,
        "contract": edit.rule.contract,
        "edit": edit.kind,
        "before": before_text(edit),
        "runs": step.runs,
        "after": after_text(edit),
        "parameters": {"before": step.before.params, "after": step.after.params},
        "flops": {
            "before": step.before.flops,
            "after": step.after.flops,
            "after_operator": step.after.operator_flops,
            "after_featuriser": step.after.featuriser_flops,
        },
        "weights": [
            {"parameter": o.parameter, "from": o.text, "pending": o.pending} for o in step.origins
        ],
        "dropped": list(step.dropped),
        **({"forms": forms} if (forms := [form_dict(n) for n in edit.new if n.choice]) else {}),
        **(
            {"candidates": [_candidate_dict(c) for c in step.candidates]} if step.candidates else {}
        ),
    }


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    return {
        "operator": "keep" if candidate.new is None else operator_text(candidate.new),
        "parameters": candidate.cost.params,
        "flops": candidate.cost.flops,
        "weights": [
            {"parameter": o.parameter, "from": o.text, "pending": o.pending}
            for o in candidate.origins
        ],
    }


def before_text(edit: Edit) -> str:
    """What is edited: sites by their roles, ops by their names."""
    if edit.ops is not None:
        return " ".join(p.node for p in edit.ops.gone)
    return " + ".join(s.role for s in edit.sites)


def after_text(edit: Edit) -> str:
    """What a site becomes, in a few words: `hyena_x(kernel=4, causal=True)`."""
    if isinstance(edit.rule.edit, Rewrite):
        return "; ".join(s.span.text for s in edit.rule.edit.statements)
    if edit.kind == "remove":
        return "nothing (contributes zero)"
    if edit.kind == "skip":
        return "the identity on the residual stream"
    if edit.kind in ("parallel", "together"):
        norm = ", norm = first" if edit.fold else ""
        return f"parallel({', '.join(edit.branches)}, merge = {edit.merge}{norm})"
    if edit.kind == "insert":
        return f"{operator_text(edit.new[0])} after {edit.sites[0].path}"
    if edit.candidates:
        words = ["keep" if c is None else operator_text(c) for c in edit.candidates]
        return f"one of {{{', '.join(words)}}}"
    return operator_text(edit.new[0])


def operator_text(new: NewModule) -> str:
    """An operator with the arguments that are not its signature's or the site's own: `sliding_window(window = 4)`.

    A form that was chosen for it is one of them: `hyena_x(kernel = 3, form = conv)`. A copy: `copy(blocks.3)`.
    """
    if new.copied is not None:
        return f"copy({new.copied.source})"
    facts = own_facts(new.site, ())
    shown = [
        f"{a.name} = {_word(a, new.arguments[a.name])}"
        for a in new.spec.args
        if new.arguments.get(a.name) is not None and new.arguments[a.name] != _default(a, facts)
    ]
    return f"{new.spec.name}({', '.join(shown)})"


def _default(arg: Arg, facts: Mapping[str, Value]) -> Value:
    if isinstance(arg.default, OfSite):
        own = facts.get(arg.default.fact)
        return arg.default.otherwise if own is None else own
    return arg.default


def _word(arg: Arg, value: Value) -> str:
    if arg.kind == "groups":
        return f"{{{value}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
