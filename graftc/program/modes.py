"""Train mode and eval mode: what a model computes in one and not in the other."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.program.export import traced
from graftc.program.model import Model
from graftc.program.repeats import is_capture_op
from graftc.program.saved import Saved
from graftc.program.traces import own_lines
from graftc.program.unsupported import check_supported

_SHOWN = 4


def check_mode(model: Model) -> tuple[Diagnostic, ...]:
    """A note (G814) on what train mode would add to a model that is in eval mode; nothing where there is nothing.

    Raises GraftError (G813) for a model in train mode that computes something else in eval mode: a student runs in
    one of them, and is verified in it.

    >>> import torch
    >>> layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    >>> model = Model(layers.eval(), {"input": torch.zeros(2, 4)})
    >>> check_mode(model)[0].code
    'G814'
    """
    check_supported(model)
    if isinstance(model.module, Saved):
        return ()
    training = model.module.training
    lines = differences(model)
    if not lines:
        return ()
    notes = tuple(Note(line) for line in lines[:_SHOWN])
    if len(lines) > _SHOWN:
        notes = (*notes, Note(f"… and {len(lines) - _SHOWN} more"))
    if training:
        fail(
            "G813",
            "the model is in train mode, where it computes something else than in eval mode",
            site="MODEL",
            wanted="`module.eval()`, before it is given",
            found="module.training is True",
            notes=notes,
            help="call `.eval()`; where every edit is local, the installed student keeps the original's train mode, and what "
            "training draws at random (label dropout) belongs to the Task",
        )
    return (
        Diagnostic(
            "G814",
            "the student is what the model computes in eval mode; in train mode the original does more",
            site="MODEL",
            notes=notes,
            help="an installed student in the modules form keeps it; what training draws at random belongs to the Task",
            severity="note",
        ),
    )


def differences(model: Model) -> list[str]:
    """`dropout at File "…", line 3, in forward …`: each line of the user's whose ops differ in the two modes."""
    found: list[Counter[tuple[str, str]]] = []
    before = {m: m.training for m in model.module.modules()}
    try:
        for training in (False, True):
            model.module.train(training)
            found.append(_ops(model))
    except GraftError as error:  # one of the two alone cannot be traced: that is a difference
        first = error.diagnostics[0]
        return [f"{first.message} ({n.message})" for n in first.notes[:1]] or [first.message]
    finally:
        for module, training in before.items():
            module.training = training
    evaluated, trained = found
    names: dict[str, dict[str, None]] = {}
    for name, line in sorted((trained - evaluated) + (evaluated - trained)):
        names.setdefault(line, {})[name.partition("[")[0]] = None
    return [f"{', '.join(ops)} at {line or 'no line of your own'}" for line, ops in names.items()]


def _ops(model: Model) -> Counter[tuple[str, str]]:
    """The calls of ops with their constant arguments, and the user's line of each."""
    ops: Counter[tuple[str, str]] = Counter()
    values = {n: model.inputs[n] for n in model.fixed}
    exported = traced(model.module, dict(model.inputs), values)
    for module in exported.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and not is_capture_op(node.target):
                    ops[_said(node)] += 1
    return ops


def _said(node: fx.Node) -> tuple[str, str]:
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    constants = [
        a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (bool, int, float))
    ]
    line = next(iter(own_lines(node.meta.get("stack_trace"))), "")
    return f"{name}{constants}", line
