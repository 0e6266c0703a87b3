"""Edits of a rule on sites: another role, path or class, another chain, other blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from graftc.diagnostics import Span, TextEdit
from graftc.language.rules import Blocks, SiteMatch
from graftc.program.analysis import ATTENTION_ROLES, Site
from graftc.rewrite.whynot.blocks import Chosen, written
from graftc.rewrite.whynot.places import Places

Edits = tuple[TextEdit, ...]
_BLOCK_WORDS = frozenset(
    ["all", "odd", "even", "first", "last", "half", "step", "of", "every", "from", "except"]
)


def role_edits(
    pattern: SiteMatch, site: Site, places: Places, block_set: Chosen | None, near: bool
) -> Edits:
    """The role that a site has, where it is of the same family (`near`); else the module by its path."""
    if pattern.what_span is None:
        return ()
    if near:
        return (TextEdit(pattern.what_span, _attention(site, places, block_set)),)
    known = site.role != "unknown" and pattern.role is not None and not pattern.within
    if known and places.refusal(_kind(pattern.role), site.path) is None:
        return (TextEdit(pattern.what_span, site.role), *_only(pattern, site, places, block_set))
    return path_edits(pattern, site, places, block_set)


def _kind(role: str | None) -> str:
    return "attention" if role in (*ATTENTION_ROLES, "attention") else role or ""


def _only(pattern: SiteMatch, site: Site, places: Places, block_set: Chosen | None) -> Edits:
    """The site's own block alone, where other blocks of the set have no site of its role."""
    if block_set is None or site.block is None:
        return ()
    served = {s.block[1] for s in _inside(places, block_set) if s.role == site.role and s.block}
    if served >= set(block_set.inside):
        return ()
    return blocks_edits(pattern.blocks, sorted(served & set(block_set.inside)))


def _inside(places: Places, block_set: Chosen) -> list[Site]:
    chain = block_set.chain.name
    return [s for i in block_set.inside for s in places.by_block.get((chain, i), ())]


def _attention(site: Site, places: Places, block_set: Chosen | None) -> str:
    """The kind of attention that all blocks of the set have, else attention of any kind."""
    if block_set is None:
        return site.role
    inside = _inside(places, block_set)
    served = {s.block for s in inside if s.role == site.role}
    return site.role if len(served) == len(block_set.inside) else "attention"


def path_edits(pattern: SiteMatch, site: Site, places: Places, block_set: Chosen | None) -> Edits:
    """The module by its path: with `*` for the block's number where all blocks of the set have such a module."""
    if pattern.what_span is None:
        return ()
    span = pattern.what_span
    if pattern.within_span is not None:
        span = span.to(pattern.within_span)
    alone = (TextEdit(span, f'module "{site.path}"'),)
    if block_set is None or site.block is None or site.block[0] != block_set.chain.name:
        return alone
    paths = block_set.chain.paths
    inside = site.path.removeprefix(paths[site.block[1]])
    if len(block_set.inside) > 1 and all(
        paths[i] + inside in places.analysis.by_path for i in block_set.inside
    ):
        prefixes = {paths[i].rpartition(".")[0] for i in block_set.inside}
        if len(prefixes) == 1:
            return (TextEdit(span, f'module "{prefixes.pop()}.*{inside}"'),)
    only = blocks_edits(pattern.blocks, [site.block[1]]) if len(block_set.inside) > 1 else ()
    return (*alone, *only)


def name_edits(pattern: SiteMatch, near: str) -> Edits:
    """Another path or class."""
    word = "module" if pattern.path is not None else "class"
    return (TextEdit(pattern.what_span, f'{word} "{near}"'),) if pattern.what_span else ()


def blocks_edits(blocks: Blocks | None, indices: Collection[int]) -> Edits:
    """Other blocks. A set that a parameter gives is left to the user: others may read it."""
    if blocks is None or not indices:
        return ()
    words = re.findall(r"[A-Za-z_]\w*", blocks.span.text)
    if any(w not in _BLOCK_WORDS for w in words):
        return ()
    return (TextEdit(blocks.span, written(indices)),)


def chain_edits(blocks: Blocks, name: str) -> Edits:
    """The chain's name, in the place of another or where there was none."""
    if blocks.chain_span is not None:
        return (TextEdit(blocks.chain_span, f'"{name}"'),)
    at = Span(blocks.span.source, blocks.span.start, blocks.span.start)
    return (TextEdit(at, f'of "{name}" '),)


def everywhere_edits(pattern: SiteMatch) -> Edits:
    """No block set."""
    last = pattern.within_span or pattern.what_span
    if last is None or pattern.blocks is None:
        return ()
    return (TextEdit(Span(last.source, last.end, pattern.blocks.span.end), ""),)


def neighbours(indices: Sequence[int], size: int) -> list[int]:
    """The blocks of a set that stand in runs, in whole groups of a size.

    >>> neighbours([0, 2, 3, 5], 2)
    [2, 3]
    """
    found: list[int] = []
    run: list[int] = []
    for index in indices:
        run = [*run, index] if run and index == run[-1] + 1 else [index]
        if len(run) == size:
            found += run
            run = []
    return found
