"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

_EVERY_SECONDS = 5.0


class Progress:
    """Called as `progress(phase, done, total, values)` by the engines; shows rate and time left."""

    def __init__(self) -> None:
        self._bar = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last: dict[str, int] = {}
        self._said = 0.0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, done: int, total: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if done <= self._last.get(phase, done):  # a phase of this name begins again
            self._started[phase] = (now, done)
        self._last[phase] = done
        begun, first = self._started[phase]
        rate = (done - first) / (now - begun) if now > begun else 0.0
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        speed = f"{rate:.1f}/s" if rate else ""
        if self._bar is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=total, rate="", shown="")
            self._bar.update(
                self._tasks[phase], completed=done, total=total, rate=speed, shown=shown
            )
            return
        if done < total and now - self._said < _EVERY_SECONDS:
            return
        self._said = now
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        print(
            f"{phase}: {done}/{total} {speed}{left}  {shown}".rstrip(), file=sys.stderr, flush=True
        )
