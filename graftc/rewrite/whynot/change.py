"""What a rule would need to match a place where it does not: single changes, and a place's whole script of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from graftc.diagnostics import Note, Span, TextEdit
from graftc.program.flat import Op

Kind = Literal[
    "role", "within", "path", "class", "chain", "block", "beyond", "group", "guard",
    "constant", "axis", "order", "extra", "missing", "op", "operand", "outside", "mask", "same", "connected",
]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One step between a rule and a place. `cost` 1 is one plain difference; `span` is in the rule.

    `fix`: an edit of the rule that takes this step away, in words; `edits`: the same as data, where the text alone
    can be told what to become. `source`: the model's own line where it shows.
    """

    kind: Kind
    cost: float
    text: str
    span: Span | None
    fix: str | None = None
    source: str | None = None
    edits: tuple[TextEdit, ...] = ()

    def edited(self, edits: tuple[TextEdit, ...]) -> Change:
        """The same with an edit of the text, which then is what `fix` says."""
        if not edits:
            return self
        fix = edits[0].told if len(edits) == 1 else self.fix
        return replace(self, edits=edits, fix=fix)


@dataclass(frozen=True)
class Miss:
    """A place that a rule does not select, and the smallest script of changes that would make it do so."""

    place: str
    changes: tuple[Change, ...]
    source: str | None = None
    alike: int = 0

    @property
    def cost(self) -> float:
        return sum(c.cost for c in self.changes)

    @property
    def aside(self) -> bool:
        """Whether the rule's block set leaves the place out: what it names comes first."""
        return any(c.kind == "block" or (c.kind == "chain" and c.cost >= 1.5) for c in self.changes)

    @property
    def text(self) -> str:
        """One line: the place, the model's own line, every change."""
        where = f" ({self.source})" if self.source else ""
        alike = f"; and {self.alike} more like it" if self.alike else ""
        return f"near miss at {self.place}{where}: {'; '.join(c.text for c in self.changes)}{alike}"

    @property
    def first(self) -> Change | None:
        """The change whose edit is suggested: the dearest that the text can be edited for, else that has advice."""
        fixes = [c for c in self.changes if c.edits] or [c for c in self.changes if c.fix]
        return max(fixes, key=lambda c: c.cost) if fixes else None

    @property
    def help(self) -> str | None:
        """One suggested edit of the rule, in words."""
        return self.first.fix if self.first else None

    @property
    def edits(self) -> tuple[TextEdit, ...]:
        """The suggested edit as data; empty where the text alone cannot help."""
        return self.first.edits if self.first else ()

    def note(self) -> Note:
        return Note(self.text, next((c.span for c in self.changes if c.span), None))


def ranked(misses: Iterable[Miss]) -> tuple[Miss, ...]:
    """Nearest first; places that need the same changes are told once, at the first of them."""
    by_script: dict[tuple[str, ...], list[Miss]] = {}
    for miss in misses:
        by_script.setdefault(tuple(_anywhere(c.text) for c in miss.changes), []).append(miss)
    found = [_with(g[0], sum(m.alike + 1 for m in g) - 1) for g in by_script.values()]
    return tuple(sorted(found, key=lambda m: (m.aside, round(m.cost, 3))))


def _with(miss: Miss, alike: int) -> Miss:
    return Miss(miss.place, miss.changes, miss.source, alike)


def _anywhere(text: str) -> str:
    """A change's text without what differs from block to block."""
    return re.sub(r"(?<=\.)\d+(?=\.|\b)|block \d+", "*", text)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*')


def source_line(op: Op | None) -> str | None:
    """Where the model's code makes this op, as capture kept it: the innermost line that is not torch's own.

    None where capture kept none (normalisation made the op) or where torch alone is in the trace.
    """
    trace = op.node.meta.get("stack_trace") if op is not None else None
    if not isinstance(trace, str):
        return None
    for file, line in reversed(_FRAME.findall(trace)):
        parts = file.replace("\\", "/")
        if "/torch/" not in parts and not parts.startswith("torch/"):
            return f"{_short(parts)}:{line}"
    return None


def _short(file: str) -> str:
    """A file as a reader knows it: from its package on, or relative to the working folder."""
    _, found, inside = file.rpartition("/site-packages/")
    if found:
        return inside
    here = os.getcwd().replace("\\", "/") + "/"
    return file.removeprefix(here)
