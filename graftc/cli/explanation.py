"""What `graftc explain` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftc.diagnostics import render

if TYPE_CHECKING:
    from graftc.rewrite.whynot import Explanation, Miss

_MOST_PLACES = 8
_MOST_MISSES = 8


def show_explanations(found: tuple[Explanation, ...], at: str | None = None) -> None:
    """Each rule: what it selects, then its near misses, the nearest first, and one suggested edit."""
    print("\n\n".join(explanation_text(e, at) for e in found))


def explanation_text(e: Explanation, at: str | None = None) -> str:
    lines = [f"rule `{e.rule.name}`   ({e.rule.span})"]
    if e.selected:
        shown = ", ".join(e.selected[:_MOST_PLACES])
        more = f", … and {len(e.selected) - _MOST_PLACES} more" * (len(e.selected) > _MOST_PLACES)
        lines.append(
            f"  selects {len(e.selected)} place{'s' * (len(e.selected) != 1)}: {shown}{more}"
        )
    elif at is not None:
        lines.append(f"  does not select {at}")
    elif not e.problems:
        lines.append("  selects nothing")
    if e.misses:
        if at is None:
            lines.append("  near misses, the nearest first:")
        for miss in e.misses[:_MOST_MISSES]:
            lines += _miss_lines(miss)
        if len(e.misses) > _MOST_MISSES:
            lines.append(f"    … and {len(e.misses) - _MOST_MISSES} more")
    if e.help:
        lines.append(f"  help: {e.help}")
    for problem in e.problems:
        lines += ["", *render(problem).splitlines()]
    return "\n".join(lines)


def _miss_lines(miss: Miss) -> list[str]:
    where = f"   ({miss.source})" if miss.source else ""
    alike = f"   and {miss.alike} more like it" if miss.alike else ""
    lines = [f"    {miss.place}{where}{alike}"]
    for change in miss.changes:
        span = f"   ({change.span})" if change.span is not None else ""
        lines.append(f"        {change.text}{span}")
    return lines
