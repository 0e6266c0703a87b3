"""SVG by hand: elements with escaped text, and how wide a text is."""

from __future__ import annotations

from html import escape

INK = "#1b1f24"
FAINT = "#57606a"
_ADVANCE = 0.62
"""Width of a character as a share of the size; generous, so that a text never leaves its box."""


def element(name: str, text: str | None = None, **attributes: object) -> str:
    """An element; `stroke_width` becomes `stroke-width`, `class_` becomes `class`.

    >>> element("text", "a < b", x=1, font_size=9)
    '<text x="1" font-size="9">a &lt; b</text>'
    """
    said = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{escape(_number(v))}"' for k, v in attributes.items()
    )
    return f"<{name}{said}/>" if text is None else f"<{name}{said}>{escape(text)}</{name}>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def group(children: list[str], title: str = "") -> str:
    """Elements with a tooltip."""
    head = element("title", title) if title else ""
    return f"<g>{head}{''.join(children)}</g>"


def label(
    text: str, x: float, y: float, *, size: float = 11, room: float = 1e9, **more: object
) -> str:
    """A text on the baseline `y`, shortened to `room`."""
    return element(
        "text", fitted(text, room, size), x=x, y=y, font_size=size, **{"fill": INK, **more}
    )


def width_of(text: str, size: float) -> float:
    """About how wide a text is; never less than it is."""
    return len(text) * size * _ADVANCE


def fitted(text: str, room: float, size: float) -> str:
    """The text, or its beginning and `…` where there is no room for all.

    >>> fitted("sliding_window", 50, 10)
    'sliding…'
    """
    most = int(room / (size * _ADVANCE))
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def document(width: float, height: float, body: list[str], title: str) -> str:
    """A whole SVG file, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">'
    )
    ground = element("rect", width="100%", height="100%", fill="#ffffff")
    return "\n".join([head, element("title", title), ground, *body, "</svg>"]) + "\n"
