"""One error type for every stage: where, what was wanted, what was found, what to do.

A `Diagnostic` is a value; `GraftError` carries one or more of them to the caller;
`render` and `to_json` are its two forms. This package imports nothing else of graftc and
no torch, so that `graftc check` and an editor stay light.
"""

from graftc.diagnostics.diagnostic import (
    Diagnostic,
    GraftError,
    Note,
    NotRunError,
    Severity,
    fail,
    nearest,
)
from graftc.diagnostics.edit import Instead, TextEdit, edited, edits_json
from graftc.diagnostics.render import render, to_json
from graftc.diagnostics.source import Source, Span

__all__ = [
    "Diagnostic",
    "GraftError",
    "Instead",
    "NotRunError",
    "Note",
    "Severity",
    "Source",
    "Span",
    "TextEdit",
    "edited",
    "edits_json",
    "fail",
    "nearest",
    "render",
    "to_json",
]
