"""Train mode and eval mode: what a model computes in one and not in the other.

A Program is what the model computes in eval mode. Dropout, the common difference, is noted beside its graphs
(`program.dropout`) and kept in the student; of any other difference the user is told, with the line.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import fx, nn

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.program import reads
from graftc.program.capture import capture, trained
from graftc.program.dropout import drops, line_of, noted, take_notes
from graftc.program.model import Model
from graftc.program.program import Program
from graftc.program.saved import Saved
from graftc.program.traces import is_own
from graftc.program.unsupported import check_supported

_SHOWN = 4


def captured(model: Model) -> Program:
    """The Program of a model in eval mode, with the dropouts of its train mode noted; the module is left in its mode.

    What else train mode would add is a note (G814) among the facts' warnings. Raises GraftError (G813) for a module
    in train mode that computes something else in eval mode, dropout aside; and as `capture`.

    >>> import torch
    >>> layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> captured(Model(layers.eval(), {"input": torch.zeros(2, 4)})).facts.warnings[0].code
    'G814'
    """
    check_supported(model)
    module = model.module
    if isinstance(module, Saved):
        return capture(model)
    with in_mode(module, training=False), reads_of_training() as readers:
        program = capture(model)
    if all(_drops_nothing(m, lines) for m, lines in readers.items()):
        return program
    lines = _add_dropout(program, model)
    if not lines:
        return program
    notes = tuple(Note(line) for line in lines[:_SHOWN])
    if len(lines) > _SHOWN:
        notes = (*notes, Note(f"… and {len(lines) - _SHOWN} more"))
    if module.training:
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
    kept = ", with the dropout of train mode" if noted(program) else ""
    told = Diagnostic(
        "G814",
        f"the student is what the model computes in eval mode{kept}; in train mode the original does more",
        site="MODEL",
        notes=notes,
        help="an installed student in the modules form keeps it; what training draws at random belongs to the Task",
        severity="note",
    )
    facts = replace(program.facts, warnings=(*program.facts.warnings, told))
    return replace(program, facts=facts)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Generator[None]:
    """Within, the module and all in it are in one mode; afterwards each is in its own."""
    before = {m: m.training for m in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for m, was in before.items():
            m.training = was


@contextmanager
def reads_of_training() -> Generator[dict[nn.Module, set[str]]]:
    """Within, the modules whose `training` is read are collected, with the lines that read it: no other module can
    tell train mode from eval mode.

    >>> with reads_of_training() as readers:
    ...     _ = nn.Sequential(nn.Dropout(0.5), nn.ReLU())(__import__("torch").zeros(1))
    >>> list(readers)
    [Dropout(p=0.5, inplace=False)]
    """
    found: dict[nn.Module, set[str]] = {}
    every: Any = nn.Module

    def read(self: nn.Module) -> bool:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename == reads.__file__:
            frame = frame.f_back  # a record of what a block reads stands between
        file = frame.f_code.co_filename
        if _computes(file):
            found.setdefault(self, set()).add(linecache.getline(file, frame.f_lineno))
        return object.__getattribute__(self, "__dict__")["training"]  # unseen by such a record

    def write(self: nn.Module, training: bool) -> None:
        object.__getattribute__(self, "__dict__")["training"] = training

    before = vars(every).get("training", _ABSENT)
    every.training = property(read, write)
    try:
        yield found
    finally:
        if before is _ABSENT:
            del every.training
        else:
            every.training = before


_ABSENT: Any = object()


def _computes(file: str) -> bool:
    """Whether code of a file makes part of a forward: the user's, a library's, torch.nn's layers."""
    return is_own(file) or ("/torch/nn/" in file and not file.endswith("modules/module.py"))


def _drops_nothing(module: nn.Module, lines: Iterable[str]) -> bool:
    """Whether a module asks for its mode for the sake of dropout alone, and every rate that it has is 0."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p == 0
    held = {**vars(module), **module._modules}
    rates = [getattr(v, "p", v) for name, v in held.items() if "drop" in name.lower()]
    return (
        bool(rates)
        and all("drop" in line.lower() for line in lines)
        and all(type(r) in (int, float) and r == 0 for r in rates)
    )


def _add_dropout(program: Program, model: Model) -> list[str]:
    """Note what train mode drops (in place); a line of the user's for each difference that is no dropout."""
    with in_mode(model.module, training=True):
        try:
            other, lost = trained(model)
        except GraftError as error:  # train mode alone cannot be traced: that is a difference
            first = error.diagnostics[0]
            return [f"{first.message} ({n.message})" for n in first.notes[:1]] or [first.message]
    paths = take_notes(program, other)
    ours, theirs = (_ops(p, paths) for p in (program, other))
    names: dict[str, dict[str, None]] = {line: {"dropout": None} for line in lost}
    graphs = dict(other.graphs())
    for path in paths:
        inside = graphs[path].graph.nodes if path in graphs else ()
        names |= {d.line: {"dropout": None} for n in inside for d in drops(n) if d.line}
    for name, line in sorted((theirs - ours) + (ours - theirs)):
        names.setdefault(line, {})[name.partition("[")[0]] = None
    for ops in names.values():
        ops.pop("getitem", None)  # of an op with several results
    if len(names) > 1:
        names.pop("", None)  # sizes and such, of ops that the others tell
    return [f"{', '.join(ops)} at {line or 'no line of your own'}" for line, ops in names.items()]


def _ops(program: Program, paths: Iterable[str]) -> Counter[tuple[str, str]]:
    """The calls of ops in some graphs with their constant arguments, and the user's line of each."""
    graphs = dict(program.graphs())
    nodes = [n for p in paths if p in graphs for n in graphs[p].graph.nodes]
    return Counter(_said(n) for n in nodes if n.op == "call_function")


def _said(node: fx.Node) -> tuple[str, str]:
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    name = (
        "batch_norm" if "batch_norm" in name else name
    )  # which has a form of its own in train mode
    constants = [
        a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (bool, int, float))
    ]
    return f"{name}{constants}", line_of(node)
