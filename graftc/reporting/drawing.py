"""The drawing of a model's chains of blocks, and of an edit: before beside after, with a legend.

Colours are Okabe and Ito's, light, with dark text; every kind of edit has a border or a pattern of its own
and a number, so that nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftc.reporting.rows import Cell, Entry, Kind, Picture, Row, Table, picture
from graftc.reporting.svg import FAINT, INK, document, element, fitted, group, label, width_of

_ROW, _GAP, _CELL, _GUTTER, _MARGIN, _MIDDLE = 20, 5, 132, 52, 18, 44
_LANE = 240.0
_FILL: Mapping[Kind, str] = {
    "same": "#f6f8fa",
    "replaced": "#cfe6f7",
    "parallel": "#fde8cf",
    "gone": "#ffffff",
    "added": "#cdeee1",
}
_EDGE: Mapping[Kind, str] = {
    "same": "#8c959f",
    "replaced": "#0072b2",
    "parallel": "#b35900",
    "gone": "#57606a",
    "added": "#00795a",
}
_SAID: Mapping[Kind, str] = {
    "same": "unchanged",
    "replaced": "replaced",
    "parallel": "run in parallel",
    "gone": "taken out",
    "added": "added",
}


def draw(
    chains: Sequence[Mapping[str, Any]], edits: Sequence[Mapping[str, Any]] = (), title: str = ""
) -> str:
    """The drawing as an SVG file: of a model alone, or of a plan with its edits.

    `chains` is what `overview` of an Analysis gives, `edits` are those of `plan.yaml`.

    >>> site = {"path": "blocks.0.attn", "role": "self_attention"}
    >>> svg = draw([{"name": "blocks", "blocks": [{"path": "blocks.0", "sites": [site]}]}])
    >>> "self-attention" in svg
    True
    """
    made = picture(chains, edits)
    columns = max((_columns(r) for t in made.tables for r in t.rows), default=1)
    lanes = max((len(r.lanes) * _lane_width(r) for t in made.tables for r in t.rows), default=0)
    width = max(columns * _CELL, lanes, _CELL)
    whole = _MARGIN * 2 + _GUTTER + width + ((_MIDDLE + _GUTTER + width) if made.edited else 0)
    whole = max(whole, 470, *(_legend_width(e) for e in made.legend), 0)
    body = [
        _PATTERN,
        label(
            title or "chains of blocks",
            _MARGIN,
            28,
            size=15,
            room=whole - 2 * _MARGIN,
            font_weight="bold",
        ),
    ]
    y = 46.0
    for table in made.tables:
        body_part, y = _table(table, y, width, made)
        body += body_part
    legend, y = _legend(made, y + 4)
    return document(whole, y + _MARGIN, [*body, *legend], title or "chains of blocks")


_PATTERN = (
    '<defs><pattern id="gone" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#ffffff"/><line x1="0" y1="0" x2="0" y2="6" stroke="#d0d7de" stroke-width="2"/>'
    "</pattern></defs>"
)


def _columns(row: Row) -> int:
    return max(len(row.before), len(row.after), *(len(b) for b in row.lanes_before), 1)


def _lane_width(row: Row) -> float:
    longest = max((width_of(_lane_text(i, c), 10.5) for i, c in row.lanes), default=0.0)
    return min(_LANE, longest + 36)


def _lane_text(index: str, cells: tuple[Cell, ...]) -> str:
    return f"{index}: " + (" · ".join(c.text for c in cells) or "block")


def _after_x(width: float) -> float:
    return _MARGIN + _GUTTER + width + _MIDDLE + _GUTTER


def _table(table: Table, y: float, width: float, made: Picture) -> tuple[list[str], float]:
    before_x = _MARGIN + _GUTTER
    plural = "s" if table.blocks != 1 else ""
    heading = (
        f"chain {table.name}: {table.blocks} block{plural}" if table.name else "outside the chains"
    )
    body = [label(heading, _MARGIN, y + 14, size=12, font_weight="bold")]
    y += 24
    if made.edited:
        body.append(label("before", before_x, y + 10, fill=FAINT))
        body.append(label("after", _after_x(width), y + 10, fill=FAINT))
        y += 18
    for at, row in enumerate(table.rows):
        height = max(1, len(row.lanes)) * (_ROW + _GAP) - _GAP
        if at and table.name:
            body += _links(y, width, made.edited)
        body += _before(row, before_x, y, width)
        if made.edited:
            body += _after(row, _after_x(width), y, width, height)
            if row.kind != "same" or any(c.kind != "same" for c in row.after):
                body += _arrow(before_x + width + 8, y + height / 2, _MIDDLE - 16)
        y += height + _GAP
    return body, y + 12


def _links(y: float, width: float, edited: bool) -> list[str]:
    """The residual stream, between two blocks."""
    middles = [_MARGIN + _GUTTER + width / 2] + ([_after_x(width) + width / 2] if edited else [])
    return [_link(x, y - _GAP, y) for x in middles]


def _link(x: float, top: float, bottom: float) -> str:
    return element("line", x1=x, y1=top, x2=x, y2=bottom, stroke=FAINT, stroke_width=1.5)


def _arrow(x: float, y: float, length: float) -> list[str]:
    end = x + length
    return [
        element("line", x1=x, y1=y, x2=end - 5, y2=y, stroke=FAINT, stroke_width=1.2),
        element("path", d=f"M{end:.1f} {y:.1f} l-7 -3.5 v7 z", fill=FAINT),
    ]


def _before(row: Row, x: float, y: float, width: float) -> list[str]:
    if row.kind == "added":
        return [_link(x + width / 2, y - _GAP, y + _ROW)]
    if not row.lanes:
        return _block(row.index, row.before, x, y, width, "same", row)
    out: list[str] = []
    for at, ((index, _), cells) in enumerate(zip(row.lanes, row.lanes_before, strict=True)):
        if at:
            out.append(_link(x + width / 2, y - _GAP, y))
        out += _block(index, cells, x, y, width, "same", row)
        y += _ROW + _GAP
    return out


def _block(
    index: str, cells: tuple[Cell, ...], x: float, y: float, width: float, kind: Kind, row: Row
) -> list[str]:
    """The index in the gutter and the block's cells beside each other."""
    out = [_index(index, x, y + 14)]
    cells = cells or (Cell("block", title=row.title),)
    each = width / len(cells)
    for i, cell in enumerate(cells):
        shown = (
            cell if cell.kind != "same" or kind == "same" else Cell(cell.text, kind, 0, cell.title)
        )
        out.append(_cell(shown, x + i * each, y, each - (3 if i + 1 < len(cells) else 0), _ROW))
    return out


def _index(text: str, x: float, y: float) -> str:
    """A block's number left of it, smaller where it is long (`21..999`, `3, 4, 5`)."""
    room = _GUTTER - 8
    size = min(11.0, max(7.0, room / width_of(text, 1))) if text else 11.0
    return label(text, x - 6, y, size=size, room=room, text_anchor="end", fill=FAINT)


def _cell(cell: Cell, x: float, y: float, width: float, height: float) -> str:
    kind = cell.kind
    parts = [_box(x, y, width, height, kind)]
    room = width - 10
    if cell.mark:
        badge = 8 + width_of(str(cell.mark), 9)
        parts.append(
            element(
                "rect",
                x=x + width - badge - 3,
                y=y + 3.5,
                width=badge,
                height=height - 7,
                rx=6,
                fill=_EDGE[kind],
            )
        )
        parts.append(
            label(
                str(cell.mark),
                x + width - 3 - badge / 2,
                y + height / 2 + 3.4,
                size=9,
                fill="#ffffff",
                text_anchor="middle",
                font_weight="bold",
            )
        )
        room -= badge + 4
    parts.append(label(cell.text, x + 6, y + height / 2 + 3.8, size=10.5, room=room))
    return group(parts, cell.title)


def _box(x: float, y: float, width: float, height: float, kind: Kind) -> str:
    dashes = {"stroke_dasharray": "4 3"} if kind == "gone" else {}
    fill = "url(#gone)" if kind == "gone" else _FILL[kind]
    thick = 1 if kind == "same" else 1.8
    return element(
        "rect", x=x, y=y, width=width, height=height, rx=3, fill=fill, stroke=_EDGE[kind], stroke_width=thick, **dashes
    )  # fmt: skip


def _after(row: Row, x: float, y: float, width: float, height: float) -> list[str]:
    if row.lanes:
        return _lanes(row, x, y, width, height)
    if row.mark and row.kind != "added":
        return [
            _index(row.index, x, y + 14),
            _cell(Cell(row.merge, row.kind, row.mark, row.title), x, y, width, _ROW),
        ]
    out = _block(row.index, row.after, x, y, width, row.kind, row)
    if row.kind == "added":
        out.append(_badge(row.mark, x + width - 18, y, "added"))
    return out


def _badge(mark: int, x: float, y: float, kind: Kind) -> str:
    return group(
        [
            element("rect", x=x, y=y + 3.5, width=14, height=_ROW - 7, rx=6, fill=_EDGE[kind]),
            label(
                str(mark),
                x + 7,
                y + _ROW / 2 + 3.4,
                size=9,
                fill="#ffffff",
                text_anchor="middle",
                font_weight="bold",
            ),
        ]
    )


def _lanes(row: Row, x: float, y: float, width: float, height: float) -> list[str]:
    """Blocks beside each other in one frame, and the bar that merges them."""
    bar = 17.0
    each = (width - 6) / len(row.lanes)
    out = [
        _index(row.index, x, y + height / 2 + 4),
        _box(x, y, width, height, "parallel"),
    ]
    lane_height = height - bar - 8
    for i, (index, cells) in enumerate(row.lanes):
        changed = next((c for c in cells if c.kind != "same"), None)
        lane = Cell(
            _lane_text(index, cells),
            changed.kind if changed else "same",
            changed.mark if changed else 0,
            row.title,
        )
        out.append(_cell(lane, x + 4 + i * each, y + 4, each - 2, lane_height))
    out.append(
        _cell(
            Cell(f"merge = {row.merge}", "parallel", row.mark, row.title),
            x + 4,
            y + height - bar - 2,
            width - 8,
            bar,
        )
    )
    return out


def _legend_width(entry: Entry) -> float:
    return _MARGIN * 2 + 54 + width_of(_entry(entry), 11)


def _entry(entry: Entry) -> str:
    said = f"{_SAID[entry.kind]}: " if entry.kind in ("replaced", "gone", "added") else ""
    times = f"{entry.places} place{'s' if entry.places != 1 else ''}"
    return f"{said}{fitted(entry.text, 520, 11)}, rule {fitted(entry.rule, 180, 11)}, {times}"


def _legend(made: Picture, y: float) -> tuple[list[str], float]:
    """A line for each edit, then one for the kinds that occur."""
    if not made.edited:
        return [], y
    body = [label("legend", _MARGIN, y + 12, size=12, font_weight="bold")]
    y += 22
    for entry in made.legend:
        body.append(_cell(Cell("", entry.kind, entry.number), _MARGIN, y, 40, _ROW))
        body.append(label(_entry(entry), _MARGIN + 50, y + 14))
        y += _ROW + _GAP
    body.append(_box(_MARGIN, y, 40, _ROW, "same"))
    body.append(label(_SAID["same"], _MARGIN + 50, y + 14, fill=INK))
    return body, y + _ROW + _GAP
