"""`graftc check`: a file's syntax and meaning, without a model."""

from __future__ import annotations

import gc
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from graftc.diagnostics import GraftError, Source, Span, fail
from graftc.language.load import read
from graftc.language.parser import parse_all
from graftc.language.resolve import resolve
from graftc.language.rules import Rules


def check(file: str | Path | Source, overrides: Mapping[str, str] | None = None) -> Rules:
    """What a `.graft` file means; `overrides` are the `--set` values.

    `file` is a path, or a text (a `Source`, or a string with a line end or a brace in it). Raises
    GraftError with every mistake that can be told without a model, in the order of the text.

    >>> rules = check("rule thin {\\n  match   b = block in blocks odd\\n  skip    b\\n}")
    >>> rules.rules[0].name, rules.rules[0].edit.binding
    ('thin', 'b')
    >>> check("rule thin {\\n  match   b = blok in blocks odd\\n  skip    b\\n}")
    Traceback (most recent call last):
        ...
    graftc.diagnostics.diagnostic.GraftError: error[G101]: unknown role `blok`
      --> text:2:15
    ...
    """
    with _without_collecting():
        return _checked(*_source(file), overrides)


@contextmanager
def _without_collecting() -> Generator[None]:
    """No search for cycles meanwhile: a syntax tree has none, and walking it again and again is half the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _checked(source: Source, folder: Path, overrides: Mapping[str, str] | None) -> Rules:
    if not source.text.strip():
        fail("G009", "this file has no rules: it is empty", span=Span(source, 0, 1),
             wanted="a rule", help="write a rule: docs/language.md begins with one")  # fmt: skip
    document, errors = parse_all(source)
    if errors and not document.items:
        raise GraftError(*errors)
    return resolve(document, overrides, folder=folder, earlier=errors)


def _source(file: str | Path | Source) -> tuple[Source, Path]:
    if isinstance(file, Source):
        return Source(file.name, file.text.removeprefix("\ufeff")), Path(file.name).parent
    if isinstance(file, str) and (not file or "\n" in file or "{" in file):
        return Source("text", file.removeprefix("\ufeff")), Path.cwd()
    path = Path(file)
    return read(path), path.parent
