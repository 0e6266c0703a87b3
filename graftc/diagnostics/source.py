"""Source text and places in it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A named text.

    >>> Source("a.graft", "one\\ntwo").line_text(2)
    'two'
    """

    name: str
    text: str

    @staticmethod
    def read(path: str | Path) -> Source:
        """The file at `path`, decoded as UTF-8 (a byte-order mark is dropped). Raises OSError, UnicodeDecodeError."""
        return Source(str(path), Path(path).read_bytes().decode("utf-8-sig"))

    @cached_property
    def _starts(self) -> list[int]:
        lengths = map((1).__add__, map(len, self.text.split("\n")))  # no Python for each character
        return [0, *accumulate(lengths)][:-1]

    def position(self, offset: int) -> tuple[int, int]:
        """1-based (line, column) of a character offset."""
        offset = max(0, min(offset, len(self.text)))
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line_text(self, line: int) -> str:
        """The text of a 1-based line, without its line end."""
        start = self._starts[line - 1]
        end = self._starts[line] - 1 if line < len(self._starts) else len(self.text)
        return self.text[start:end].rstrip("\r")


@dataclass(frozen=True)
class Span:
    """Characters `start..end` (end excluded) of a source.

    >>> str(Span(Source("a.graft", "one\\ntwo"), 4, 7))
    'a.graft:2:1'
    """

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def to(self, other: Span) -> Span:
        """The smallest span that covers both."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"

    def __repr__(self) -> str:
        return f"Span({self})"
