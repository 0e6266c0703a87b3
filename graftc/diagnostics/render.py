"""The two forms of a diagnostic: text for people, JSON-ready data for editors."""

from __future__ import annotations

from typing import Any

from graftc.diagnostics.diagnostic import Diagnostic
from graftc.diagnostics.edit import edits_json
from graftc.diagnostics.source import Span

_WIDEST_LINE = 160


def render(diagnostic: Diagnostic) -> str:
    """The diagnostic as text: head, place, line with caret, related lines, help.

    >>> from graftc.diagnostics.source import Source
    >>> print(render(Diagnostic("G002", "unknown role `atention`",
    ...     span=Span(Source("a.graft", "match a = atention"), 10, 18), help="write `attention`")))
    error[G002]: unknown role `atention`
      --> a.graft:1:11
       |
     1 | match a = atention
       |           ^^^^^^^^
       = help: write `attention`
    """
    lines = [f"{diagnostic.severity}[{diagnostic.code}]: {diagnostic.message}"]
    if diagnostic.span is not None:
        lines += _excerpt(diagnostic.span, diagnostic.label)
        if diagnostic.site:
            lines.append(f"   = at {diagnostic.site}")
    elif diagnostic.site:
        lines.append(f"  --> {diagnostic.site}")
    if diagnostic.wanted is not None:
        lines.append(f"   = wanted: {diagnostic.wanted}")
    if diagnostic.found is not None:
        lines.append(f"   = found: {diagnostic.found}")
    for note in diagnostic.notes:
        place = f"   ({note.span})" if note.span else ""
        lines.append(f"   = {note.message}{place}")
    if diagnostic.help:
        lines.append(f"   = help: {diagnostic.help}")
    return "\n".join(lines)


def _excerpt(span: Span, label: str) -> list[str]:
    line, column = span.line, span.column
    text = span.source.line_text(line).replace("\t", " ")
    width = max(1, min(span.end - span.start, len(text) - column + 1))
    if len(text) > _WIDEST_LINE:  # a one-line file of 10 MB must not be printed whole
        first = max(0, column - 1 - _WIDEST_LINE // 2)
        text, column = text[first : first + _WIDEST_LINE], column - first
        width = max(1, min(width, len(text) - column + 1))
    number = str(line)
    margin = " " * max(2, len(number) + 1)
    caret = " " * (column - 1) + "^" * width + (f" {label}" if label else "")
    return [
        f"  --> {span}",
        f" {margin}|",
        f"{number:>{len(margin)}} | {text}",
        f" {margin}| {caret}",
    ]


def _span_json(span: Span | None) -> dict[str, Any] | None:
    if span is None:
        return None
    end_line, end_column = span.source.position(span.end)
    return {
        "file": span.source.name,
        "line": span.line,
        "column": span.column,
        "end_line": end_line,
        "end_column": end_column,
    }


def to_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """The diagnostic as JSON-ready data (`graftc … --format json`).

    >>> to_json(Diagnostic("G001", "no such file", site="a.graft"))["site"]
    'a.graft'
    """
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "span": _span_json(diagnostic.span),
        "site": diagnostic.site,
        "label": diagnostic.label,
        "wanted": diagnostic.wanted,
        "found": diagnostic.found,
        "notes": [{"message": n.message, "span": _span_json(n.span)} for n in diagnostic.notes],
        "help": diagnostic.help,
        "edits": edits_json(diagnostic.edits),
    }
