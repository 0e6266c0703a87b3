"""The two forms of a student: the original's class with modules in place, or the generated module.

Where every edit is local to a module, that module can take its place in the original Python class,
which keeps what a capture fixes: other resolutions, masks, caches, train mode. Restructuring needs
the generated form. `forms` says which there are, and how the original calls each module.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graftc.program.analysis import Analysis
from graftc.program.calls import CallRecord, Leaf, recorded
from graftc.program.model import Model
from graftc.program.modes import in_mode
from graftc.program.program import Program, shape_hint
from graftc.program.saved import Saved
from graftc.rewrite.edits import Edit
from graftc.rewrite.plan import Plan

LOCAL = ("replace", "remove", "skip")


def forms(plan: Plan, analysis: Analysis, student: Program, model: Model) -> dict[str, Any]:
    """An entry for the manifest: the original's class and call, and `modules`, or None and a `reason`."""
    if isinstance(model.module, Saved):
        return {
            "class": "",
            "modules": None,
            "reason": "a saved program has no Python class of its own",
        }
    outlined = bool(analysis.program.moved)  # a module that the original has not
    paths = [] if outlined else [s.path for e in plan.edits for s in e.sites]
    found: dict[str, Any] = {"class": analysis.program.classes.get("", ""), "modules": None}
    try:
        with in_mode(model.module, training=False):
            calls = recorded(model, ["", *paths])
    except Exception as error:  # the original's own: it needs values to run
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return {**found, "reason": f"the original does not run on fake tensors: {first}"}
    root = calls[""]
    found["call"] = {"kind": root.kind, "outputs": [leaf.name for leaf in root.outputs]}
    if outlined:
        return {**found, "reason": "parts were outlined from a block's own forward"}
    for edit in plan.edits:
        if edit.kind not in LOCAL:
            reason = f"rule `{edit.rule.name}` restructures {edit.name}"
            return {**found, "reason": reason}
    modules: dict[str, Any] = {}
    for edit in plan.edits:
        (site,) = edit.sites
        if edit.kind == "replace" and not edit.new:
            continue  # `one of {keep, …}`: the original's own module stays
        if site.path not in calls:
            return {**found, "reason": f"{site.path} is not called as a module by the original"}
        entry = _entry(edit, analysis, student, calls[site.path])
        if isinstance(entry, str):
            return {**found, "reason": f"{site.path}: {entry}"}
        modules[site.path] = entry
    return {**found, "modules": modules}


def _entry(
    edit: Edit, analysis: Analysis, student: Program, record: CallRecord
) -> dict[str, Any] | str:
    """How the module at an edit's site is called; or why it cannot stand there.

    `arguments`: the operator's, by position ("0") or by name, as they lie in the original's call.
    """
    (site,) = edit.sites
    call = analysis.flat.first_calls[site.path]
    if edit.kind == "replace":
        node = student.calls()[site.path][0][1]
        given: dict[str, Any] = {str(i): n for i, n in enumerate(node.args)} | dict(node.kwargs)
    else:
        given = {"0": call.args[site.stream].node}
    free = list(record.inputs)
    names: dict[str, str] = {}
    for parameter, value in given.items():
        leaf = _take(free, shape_hint(value)) if isinstance(value, fx.Node) else None
        if leaf is None:
            return "the operator reads a tensor that the original does not pass to this module"
        names[parameter] = leaf.name
    results = call.result if isinstance(call.result, tuple) else (call.result,)
    outputs: list[str] = []
    free = list(record.outputs)
    for result in results:
        leaf = _take(free, shape_hint(result.node)) if hasattr(result, "node") else None
        if leaf is None:
            return "the original returns something else than the captured graph"
        outputs.append(leaf.name)
    if record.kind not in ("tensor", "tuple"):
        return f"it returns a {record.kind}"
    return {
        "edit": edit.kind,
        "arguments": names,
        "outputs": outputs,
        "length": record.length if record.kind == "tuple" else 0,
        "mixes_tokens": edit.kind != "replace" or edit.new[0].spec.mixes == "tokens",
        "takes_mask": "mask" in names,
    }


def _take(free: list[Leaf], shape: tuple[int, ...] | None) -> Leaf | None:
    """The first leaf of that shape, the batch aside, which is not given out yet."""
    if shape is None:
        return None
    for leaf in free:
        if len(leaf.shape) == len(shape) and leaf.shape[1:] == shape[1:]:
            free.remove(leaf)
            return leaf
    return None
