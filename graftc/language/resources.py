"""Finds the files that ship with graftc: the grammar and the standard rules.

A wheel holds them inside the package (`graftc/_data/grammar`, `graftc/_data/rules`); a checkout
and an editable install have them beside it. The package's own copy wins, so that an installed
graftc never reads a folder that happens to lie next to it.
"""

from __future__ import annotations

from pathlib import Path

from graftc.diagnostics import fail

_PACKAGE = Path(__file__).resolve().parent.parent
_PLACES = (_PACKAGE / "_data", _PACKAGE.parent)


def shipped(relative: str) -> Path:
    """The path of a shipped file or folder.

    >>> shipped("grammar/graft.lark").name
    'graft.lark'
    >>> shipped("grammar/nothing.lark")
    Traceback (most recent call last):
        ...
    graftc.diagnostics.diagnostic.GraftError: error[G001]: graftc's own file `grammar/nothing.lark` is missing
      ...
    """
    for place in _PLACES:
        if (place / relative).exists():
            return place / relative
    fail(
        "G001",
        f"graftc's own file `{relative}` is missing",
        site=str(_PLACES[0] / relative),
        wanted=" or ".join(str(place / relative) for place in _PLACES),
        help="install graftc again; the wheel carries its grammar and its rules",
    )


def grammar_text() -> str:
    """The text of grammar/graft.lark."""
    return shipped("grammar/graft.lark").read_text(encoding="utf-8")


def rules_folder() -> Path:
    """The folder that `use std.…` reads."""
    return shipped("rules")
