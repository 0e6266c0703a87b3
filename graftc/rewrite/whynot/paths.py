"""Paths and classes that are near what a rule names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

from graftc.rewrite.globs import path_matches

_GAP = 0.5
_FURTHEST = 1.3


@dataclass(frozen=True)
class Near:
    """A pattern that would match a path, and how far it is from the one written (0 is the same)."""

    pattern: str
    distance: float


def near_path(pattern: str, path: str) -> Near | None:
    """The pattern nearest to the one written that matches this path, None where nothing is near.

    >>> near_path("blocks.*.atn", "blocks.3.attn").pattern
    'blocks.*.attn'
    >>> near_path("blocks.*.up", "blocks.3.mlp.up").pattern
    'blocks.*.mlp.up'
    >>> near_path("*.attn", "blocks.3.attn").pattern
    '**.attn'
    """
    if path_matches(pattern, path):
        return Near(pattern, 0.0)
    wide = pattern.replace("**", "*").replace("*", "**")
    if wide != pattern and path_matches(wide, path) and wide.startswith("**"):
        return Near(wide, 0.3)
    aligned = _aligned(tuple(pattern.split(".")), tuple(path.split(".")))
    if aligned is None:
        return None
    distance, parts = aligned
    made = ".".join(parts)
    return Near(made, distance) if path_matches(made, path) else None


@lru_cache(maxsize=65536)
def _aligned(
    wanted: tuple[str, ...], found: tuple[str, ...]
) -> tuple[float, tuple[str, ...]] | None:
    """The cheapest way from a pattern's parts to a path's: keep, correct, leave out, put in."""
    if not wanted and not found:
        return 0.0, ()
    ways: list[tuple[float, tuple[str, ...]]] = []
    if wanted and found and (step := _part(wanted[0], found[0])) is not None:
        rest = _aligned(wanted[1:], found[1:])
        if rest is not None:
            ways.append((step[0] + rest[0], (step[1], *rest[1])))
    if wanted and (rest := _aligned(wanted[1:], found)) is not None:
        ways.append((_GAP + rest[0], rest[1]))
    if found and (rest := _aligned(wanted, found[1:])) is not None:
        put = "*" if found[0].isdigit() else found[0]
        ways.append((_GAP + rest[0], (put, *rest[1])))
    best = min(ways, default=None, key=lambda w: w[0])
    return best if best is not None and best[0] <= _FURTHEST else None


def _part(wanted: str, found: str) -> tuple[float, str] | None:
    """One name corrected: an index that is not there becomes `*`."""
    if path_matches(wanted, found):
        return 0.0, wanted
    if wanted.isdigit() and found.isdigit():
        return 0.4, "*"
    likeness = _likeness(wanted, found)
    return (1 - likeness, found) if likeness >= 0.5 else None


@lru_cache(maxsize=65536)
def _likeness(wanted: str, found: str) -> float:
    return SequenceMatcher(None, wanted, found, autojunk=False).ratio()


def near_class(wanted: str, classes: Iterable[str]) -> Near | None:
    """The class nearest to the one written: of the same name in another package, or spelt alike.

    >>> near_class("Atention", ["m.Attention", "m.Mlp"]).pattern
    'Attention'
    >>> near_class("timm.layers.Mlp", ["model.Mlp"]).pattern
    'Mlp'
    """
    short = wanted.rpartition(".")[2]
    known = dict.fromkeys(c.rpartition(".")[2] for c in classes if c)
    if short in known:
        return Near(short, 0.3)
    return _nearest(short, list(known))


def _nearest(word: str, known: Sequence[str]) -> Near | None:
    scored = [(1 - _likeness(word, k), k) for k in known]
    best = min(scored, default=None)
    return Near(best[1], best[0]) if best is not None and best[0] <= 0.5 else None
