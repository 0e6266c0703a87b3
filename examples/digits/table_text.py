"""The digits table as text: Markdown for the record, plain data for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = (
    "model",
    "Fréchet distance",
    "read as asked",
    "held-out loss",
    "compute",
    "parameters",
    "FLOPs",
)


@dataclass(frozen=True)
class Line:
    """A row's figures. `compute` is a share of pretraining; None where a figure makes no sense for the row."""

    key: str
    name: str
    values: tuple[float, ...]
    read_as_asked: float | None = None
    held_out_loss: float | None = None
    compute: float | None = None
    parameters: int | None = None
    flops: int | None = None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for one seed."""
        if len(self.values) < 2:
            return None
        return (sum((v - self.mean) ** 2 for v in self.values) / (len(self.values) - 1)) ** 0.5


def cells(line: Line) -> tuple[str, ...]:
    """A line's cells in the order of `COLUMNS`.

    >>> cells(Line("t", "teacher", (1.0, 2.0), 0.985, 0.0797, 0.0, 627394, 59457536))
    ('teacher', '1.50 ± 0.71', '98.5 %', '0.0797', '0', '627,394', '59.46 M')
    """
    return (
        line.name,
        distance_text(line.mean, line.deviation),
        "" if line.read_as_asked is None else f"{100 * line.read_as_asked:.1f} %",
        "" if line.held_out_loss is None else f"{line.held_out_loss:.4f}",
        "" if line.compute is None else share_text(line.compute),
        "" if line.parameters is None else f"{line.parameters:,}",
        "" if line.flops is None else f"{line.flops / 1e6:.2f} M",
    )


def distance_text(mean: float, deviation: float | None) -> str:
    """Mean ± deviation, to two decimals, or three figures where it is large.

    >>> distance_text(0.1934, 0.0031), distance_text(23.4, 1.21), distance_text(1.5, None)
    ('0.193 ± 0.003', '23.4 ± 1.2', '1.50')
    """
    digits = 3 if mean < 1 else 2 if mean < 10 else 1
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def share_text(share: float) -> str:
    """A share of pretraining in per cent, two figures.

    >>> share_text(0.0), share_text(0.0312), share_text(0.00027)
    ('0', '3.1 %', '0.027 %')
    """
    return f"{100 * share:.2g} %" if share else "0"


def markdown(lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The table and what stands under it, as Markdown; figures are aligned to the right."""
    body = ["| " + " | ".join(cells(line)) + " |" for line in lines]
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" + "---:|" * (len(COLUMNS) - 1)]
    return "\n".join([*head, *body, "", *(f"{note}\n" for note in notes)])


def plain(lines: Sequence[Line], about: dict[str, Any]) -> dict[str, Any]:
    """The same as plain data: every value of every seed, and the protocol."""
    rows = [{**asdict(line), "mean": line.mean, "deviation": line.deviation} for line in lines]
    return {**about, "rows": rows}
