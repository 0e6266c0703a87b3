"""What was asked of an export, read from the command line's words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftc.deploy.runtimes import PRECISIONS, Opset, Precision, Runtime, choose_opset, runtime
from graftc.diagnostics import fail, nearest

To = Literal["onnx", "tensorrt"]


@dataclass(frozen=True)
class Range:
    """The sizes of a dynamic dimension: the smallest, the usual, the largest."""

    name: str
    low: int
    usual: int
    high: int

    @property
    def free(self) -> bool:
        return self.low != self.high

    @property
    def traced(self) -> int:
        """The size to trace at: torch.export fixes a size of 1, so a free dimension is traced at 2 at least."""
        return max(2, self.usual) if self.free else self.usual

    def __str__(self) -> str:
        return f"{self.name}={self.low}:{self.usual}:{self.high}"


@dataclass(frozen=True)
class Request:
    """A checked request: what to write, in which precision and opset, for which shapes."""

    to: To
    precision: Precision
    opset: Opset
    target: Runtime | None
    ranges: tuple[Range, ...]

    def corners(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Name and sizes of the usual shape, of every corner of the ranges, and of one odd shape inside.

        >>> from graftc.deploy.runtimes import Opset
        >>> r = Request("onnx", "fp32", Opset(20, ""), None, (Range("batch", 1, 2, 8),))
        >>> [(n, s["batch"]) for n, s in r.corners()]
        [('usual', 2), ('batch-1', 1), ('batch-8', 8), ('odd', 7)]
        """
        yield "usual", {r.name: r.usual for r in self.ranges}
        seen = {tuple(r.usual for r in self.ranges)}
        ends = [dict.fromkeys((r.low, r.high)) for r in self.ranges]
        for sizes in itertools.product(*ends):
            if sizes not in seen:
                seen.add(sizes)
                named = {r.name: n for r, n in zip(self.ranges, sizes, strict=True)}
                yield "_".join(f"{k}-{v}" for k, v in named.items()), named
        odd = tuple(_odd(r) for r in self.ranges)
        if odd not in seen:
            yield "odd", {r.name: n for r, n in zip(self.ranges, odd, strict=True)}


def _odd(r: Range) -> int:
    """The largest odd size strictly inside the range, else its largest size."""
    inside = [n for n in range(r.high - 1, max(r.low, r.high - 3), -1) if n % 2]
    return inside[0] if inside else r.high


def read_request(
    config: Mapping[str, Any],
    *,
    to: str = "onnx",
    precision: str = "fp32",
    dynamic: str | None = None,
    target: str | None = None,
    opset: str = "auto",
) -> Request:
    """The request for a package. Raises GraftError for what the package or the target cannot do."""
    if to not in ("onnx", "tensorrt"):
        fail("G600", f"cannot export to `{to}`", site="--to", wanted="onnx, tensorrt", found=to)
    if precision not in PRECISIONS:
        fail(
            "G661",
            f"no such precision: {precision}",
            site="--precision",
            wanted=", ".join(PRECISIONS),
            found=precision,
        )
    chosen = precision
    where = runtime(target)
    asked = read_ranges(dynamic or "")
    return Request(
        to, chosen, choose_opset(opset, chosen, where, to), where, _ranges(config, asked)
    )  # fmt: skip


def read_ranges(text: str) -> dict[str, Range]:
    """`batch=1:2:8,tokens=256:1024:4096` by name; `batch=4` is one fixed size.

    >>> str(read_ranges("batch=1:2:8")["batch"])
    'batch=1:2:8'
    """
    found: dict[str, Range] = {}
    for item in [t.strip() for t in text.split(",") if t.strip()]:
        match = re.fullmatch(r"(\w+)=(\d+)(?::(\d+):(\d+))?", item)
        if match is None:
            fail(
                "G663",
                f"cannot read `{item}`",
                site="--dynamic",
                wanted="name=smallest:usual:largest",
                found=item,
            )
        name, low = match[1], int(match[2])
        usual, high = (int(match[3]), int(match[4])) if match[3] else (low, low)
        if not 1 <= low <= usual <= high:
            fail(
                "G663",
                f"`{item}` is no range: sizes are 1 or more, and rise",
                site="--dynamic",
                found=item,
            )
        if name in found:
            fail("G663", f"`{name}` is given twice", site="--dynamic")
        found[name] = Range(name, low, usual, high)
    return found


def _ranges(config: Mapping[str, Any], asked: Mapping[str, Range]) -> tuple[Range, ...]:
    """A range for each dynamic dimension of the package: the one asked for, or 1 (batch) to twice the example."""
    dynamic: Mapping[str, int] = config["facts"]["dynamic"]
    for name in asked:
        if name not in dynamic:
            notes = "; ".join(config["facts"].get("notes", []))
            near = nearest(name, dynamic)
            fail("G664", f"`{name}` is no dynamic dimension of this model", site="--dynamic",
                 wanted=", ".join(dynamic) or "none: all sizes are fixed", found=name,
                 help=f"write `{near}`" if near else "capture fixed it"
                 + (f" ({notes})" if notes else "; name it in `graftc.Model(…, dynamic = …)` and compile again"))  # fmt: skip
    return tuple(asked.get(n) or _default(n, int(size)) for n, size in dynamic.items())


def _default(name: str, size: int) -> Range:
    usual = max(2, size)
    return (
        Range(name, 1, usual, max(8, usual))
        if name == "batch"
        else Range(name, usual, usual, usual)
    )
