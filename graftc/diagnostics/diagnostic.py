"""The diagnostic, and the exception that carries it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from graftc.diagnostics.edit import Instead, TextEdit
from graftc.diagnostics.source import Span

_LONGEST_NAME = 100
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Note:
    """A related line: another place in the text, a site of the model, or a remark."""

    message: str
    span: Span | None = None


@dataclass(frozen=True)
class Diagnostic:
    """What is wrong and where.

    `code` is stable (`G031`); `span` is a place in a `.graft` file, `site` a place in a model,
    a file or a command line; `label` stands beside the caret; `wanted` and `found` are set
    where the two can be named; `help` is one suggested edit, in words, and `edits` the same as data.
    """

    code: str
    message: str
    span: Span | None = None
    site: str | None = None
    label: str = ""
    wanted: str | None = None
    found: str | None = None
    notes: tuple[Note, ...] = ()
    help: str | None = None
    severity: Severity = "error"
    edits: tuple[TextEdit, ...] = ()


class GraftError(Exception):
    """One or more diagnostics: the input of the user is wrong (exit code 1).

    >>> str(GraftError(Diagnostic("G001", "no such file", site="a.graft")))
    'error[G001]: no such file\\n  --> a.graft'
    """

    exit_code = 1

    def __init__(self, *diagnostics: Diagnostic) -> None:
        if not diagnostics:
            raise ValueError("a GraftError carries at least one diagnostic")
        super().__init__(*diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = diagnostics

    def __str__(self) -> str:
        from graftc.diagnostics.render import render

        return "\n\n".join(render(d) for d in self.diagnostics)


class NotRunError(GraftError):
    """Something that was asked for could not run here, because something is missing (exit code 3)."""

    exit_code = 3


def fail(
    code: str,
    message: str,
    *,
    span: Span | None = None,
    site: str | None = None,
    label: str = "",
    wanted: str | None = None,
    found: str | None = None,
    notes: Sequence[Note] = (),
    help: str | Instead | None = None,
) -> NoReturn:
    """Raise a `GraftError` with one diagnostic; `Instead` as `help` is an edit of the text at `span`."""
    edits: tuple[TextEdit, ...] = ()
    if isinstance(help, Instead):
        edits = (TextEdit(span, help.text),) if span is not None else ()
        help = str(help)
    raise GraftError(
        Diagnostic(code, message, span, site, label, wanted, found, tuple(notes), help, edits=edits)
    )


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None if none is near.

    >>> nearest("hyena_z", ["hyena_x", "mlp"])
    'hyena_x'
    >>> nearest("zzz", ["mlp"]) is None
    True
    """
    if len(name) > _LONGEST_NAME:
        return None  # difflib is quadratic, and nobody misspells so much
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None
