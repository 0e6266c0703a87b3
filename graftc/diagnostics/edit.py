"""A suggested edit of a text as data: which characters become what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graftc.diagnostics.source import Source, Span


@dataclass(frozen=True)
class TextEdit:
    """The characters of `span` become `text`; an empty span is an insertion, an empty text takes them out."""

    span: Span
    text: str

    @property
    def told(self) -> str:
        """The edit in words.

        >>> source = Source("a.graft", "heads(a) == 8")
        >>> TextEdit(Span(source, 12, 13), "4").told, TextEdit(Span(source, 8, 13), "").told
        ('write `4` for `8`', 'leave out `== 8`')
        """
        old, new = _line(self.span.text), _line(self.text)
        if not old:
            return f"add `{new}`"
        return f"write `{new}` for `{old}`" if new else f"leave out `{old}`"


@dataclass(frozen=True)
class Instead:
    """Advice to write another text where a diagnostic stands: its help, and the same as an edit.

    >>> str(Instead("mlp"))
    'write `mlp`'
    """

    text: str

    def __str__(self) -> str:
        return f"write `{self.text}`"


_LONGEST = 100


def _line(text: str) -> str:
    """A text on one line, cut where it is long."""
    found = " ".join(text.split())
    return found if len(found) <= _LONGEST else found[: _LONGEST - 1] + "…"


def edited(source: Source, edits: Iterable[TextEdit]) -> Source:
    """The text with all edits made. Raises ValueError where two overlap or one is of another text.

    >>> source = Source("a.graft", "x - y")
    >>> edited(source, [TextEdit(Span(source, 0, 1), "y"), TextEdit(Span(source, 4, 5), "x")]).text
    'y - x'
    """
    text, end = source.text, len(source.text)
    for edit in sorted(edits, key=lambda e: (e.span.start, e.span.end), reverse=True):
        if edit.span.source.name != source.name or edit.span.end > end:
            raise ValueError(f"an edit at {edit.span} overlaps another, or is of another text")
        text = text[: edit.span.start] + edit.text + text[edit.span.end :]
        end = edit.span.start
    return Source(source.name, text)


def edits_json(edits: Sequence[TextEdit]) -> list[dict[str, object]]:
    """Edits as JSON-ready data; columns count characters, from 1."""
    found: list[dict[str, object]] = []
    for edit in edits:
        (line, column), (end_line, end_column) = (
            edit.span.source.position(x) for x in (edit.span.start, edit.span.end)
        )
        where = {"file": edit.span.source.name, "line": line, "column": column}
        found.append({**where, "end_line": end_line, "end_column": end_column, "text": edit.text})
    return found
