"""What targets say of a site beside how to train it: its first weights and its size a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

from graftc.distillation.reader import Table


@dataclass(frozen=True)
class FirstWeight:
    """Where a parameter's first value comes from; `rows` (start, stop) where it fills only some.

    `source` names the teacher's parts by module path, so that it says the same from file to file.
    `pending`: the value is solved from data before training.
    """

    parameter: str
    source: str
    pending: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class PerSample:
    """What one sample costs at a site: bytes of the teacher's values (inputs and output), forward FLOPs."""

    bytes: int
    teacher_flops: int
    student_flops: int


@dataclass(frozen=True)
class Noise:
    """The task that makes batches from raw samples: it alone draws noise and drops labels.

    `task`: its class. `settings`: what it is set to (schedule, steps, label dropout, …), plain values.
    """

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


def first_weights(table: Table) -> tuple[FirstWeight, ...]:
    """The rows of `init`."""
    found: list[FirstWeight] = []
    for row in table.tables("init", ()):
        rows = row.integers("rows", None) if row.has("rows") else None
        if rows is not None and len(rows) != 2:
            row.wrong("rows", "`rows` is [start, stop]")
        found.append(
            FirstWeight(
                row.text("parameter"),
                row.text("source"),
                row.boolean("pending", False),
                None if rows is None else (rows[0], rows[1]),
            )
        )
        row.done()
    return tuple(found)


def per_sample(table: Table) -> PerSample | None:
    """`sample`, where a file has it (version 2)."""
    if not table.has("sample"):
        return None
    row = table.table("sample")
    made = PerSample(
        row.integer("bytes"), row.integer("teacher_flops"), row.integer("student_flops")
    )
    row.done()
    return made


def noise(table: Table) -> Noise | None:
    """`noise`, where compile knew the task."""
    if not table.has("noise"):
        return None
    row = table.table("noise")
    made = Noise(row.text("task"), plain_mapping(row, "settings"))
    row.done()
    return made


def plain_mapping(table: Table, name: str) -> Mapping[str, Any]:
    """A table of plain values that is kept as it stands: arguments of an operator, settings of a task."""
    given = table.take(name, {})
    if not isinstance(given, Mapping):
        table.wrong(name, f"`{name}` is a table")
    return {str(k): v for k, v in cast("Mapping[Any, Any]", given).items()}


def noise_of(task: Any) -> Noise:
    """A task as targets name it: its class, and its settings where it is a dataclass.

    >>> from graftc.tasks import DDPM
    >>> noise_of(DDPM(null_label=10)).settings["null_label"]
    10
    """
    kind = type(task)
    settings: dict[str, Any] = {}
    if is_dataclass(task):
        found = {f.name: getattr(task, f.name) for f in fields(task)}
        settings = {k: _plain(v) for k, v in found.items()}
    return Noise(f"{kind.__module__}.{kind.__qualname__}", settings)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in cast("list[Any]", value)]
    return repr(value)
