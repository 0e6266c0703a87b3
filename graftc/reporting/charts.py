"""Charts by hand: bars of errors by site, lines of losses by step. Dark text, and dashes beside colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftc.reporting.svg import FAINT, document, element, group, label, width_of

_COLOURS = ("#0072b2", "#b35900", "#00795a", "#9b4d83", "#7a6a00", "#2b7bba", "#5b5b5b", "#a02c2c")
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 2 2 2 2")
_BAR, _GAP = 16, 6


def bars(rows: Sequence[tuple[str, float, float]], before: str, after: str, title: str) -> str:
    """Two bars a row, on a logarithmic axis: (name, value before, value after), values above 0.

    A value of 0 has no bar; its number stands there all the same.
    """
    left = min(260.0, max((width_of(n, 11) for n, _, _ in rows), default=40) + 20)
    values = [v for _, a, b in rows for v in (a, b) if v > 0 and math.isfinite(v)]
    low, high = _decades(values)
    plot, right = 420.0, 120.0
    body = [label(f"{before} (outlined) and {after} (filled)", 12, 20, size=12)]
    y = 34.0

    def x_of(value: float) -> float:
        if not (value > 0 and math.isfinite(value)):
            return 0.0
        return plot * (math.log10(value) - low) / (high - low)

    for name, first, last in rows:
        height = _BAR
        body.append(label(name, left, y + 12, size=11, room=left - 14, text_anchor="end"))
        parts = [
            element("rect", x=left + 8, y=y, width=max(0.0, x_of(first)), height=height / 2 - 1, fill="#ffffff", stroke=_COLOURS[0], stroke_width=1.2),
            element("rect", x=left + 8, y=y + height / 2, width=max(0.0, x_of(last)), height=height / 2, fill=_COLOURS[0]),
        ]  # fmt: skip
        body.append(group(parts, f"{name}: {first:.4g} → {last:.4g}"))
        body.append(
            label(f"{first:.3g} → {last:.3g}", left + plot + 16, y + 12, size=10.5, room=right)
        )
        y += _BAR + _GAP
    y += 4
    for decade in range(low, high + 1):
        x = left + 8 + plot * (decade - low) / (high - low)
        body.append(element("line", x1=x, y1=30, x2=x, y2=y, stroke="#d0d7de", stroke_width=0.7))
        body.append(
            label(f"{10.0**decade:g}", x, y + 13, size=10, text_anchor="middle", fill=FAINT)
        )
    return document(left + plot + right + 30, y + 24, body, title)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    if not values:
        return -1, 0
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def lines(curves: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Values by step on a logarithmic axis; a legend on the right, in the order of the last values."""
    drawn = {
        name: [(s, v) for s, v in points if v > 0 and math.isfinite(v)]
        for name, points in curves.items()
    }
    drawn = {n: p for n, p in drawn.items() if p}
    order = sorted(drawn, key=lambda n: -drawn[n][-1][1])
    steps = [s for p in drawn.values() for s, _ in p]
    low, high = _decades([v for p in drawn.values() for _, v in p])
    first, last = (min(steps), max(steps)) if steps else (0, 1)
    left, top, plot = 64.0, 34.0, 520.0
    tall = max(200.0, 18.0 * len(order))
    legend = max((width_of(n, 10.5) for n in order), default=0) + 60

    def at(step: int, value: float) -> str:
        x = left + plot * (step - first) / max(1, last - first)
        y = top + tall * (high - math.log10(value)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    body = [label(title, 12, 20, size=12)]
    for decade in range(low, high + 1):
        y = top + tall * (high - decade) / (high - low)
        body.append(
            element("line", x1=left, y1=y, x2=left + plot, y2=y, stroke="#d0d7de", stroke_width=0.7)
        )
        body.append(
            label(f"{10.0**decade:g}", left - 6, y + 4, size=10, text_anchor="end", fill=FAINT)
        )
    for number, name in enumerate(order):
        colour, dash = (
            _COLOURS[number % len(_COLOURS)],
            _DASHES[(number // len(_COLOURS) + number) % len(_DASHES)],
        )
        style: dict[str, Any] = {
            "fill": "none",
            "stroke": colour,
            "stroke_width": 1.6,
            **({"stroke_dasharray": dash} if dash else {}),
        }
        points = drawn[name]
        shown = points[:: max(1, len(points) // 400)]
        if shown[-1] != points[-1]:
            shown.append(points[-1])
        body.append(
            group([element("polyline", points=" ".join(at(s, v) for s, v in shown), **style)], name)
        )
        y = top + 10 + 18 * number
        x = left + plot + 16
        body.append(element("line", x1=x, y1=y, x2=x + 26, y2=y, **style))
        body.append(label(name, x + 32, y + 4, size=10.5))
    bottom = top + tall
    body.append(label(str(first), left, bottom + 16, size=10, text_anchor="middle", fill=FAINT))
    body.append(
        label(str(last), left + plot, bottom + 16, size=10, text_anchor="middle", fill=FAINT)
    )
    body.append(
        label("step", left + plot / 2, bottom + 16, size=10, text_anchor="middle", fill=FAINT)
    )
    return document(left + plot + legend, bottom + 26, body, title)
