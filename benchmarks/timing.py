"""Measuring for benchmarks: interleaved runs, medians, a cap on time, and the text that a benchmark returns."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What a benchmark found: a table, and sentences on how it was measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """The report as Markdown."""
        head = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        body = ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(
            [f"## {self.title}", "", *head, *body, "", *(f"{note}\n" for note in self.notes)]
        )


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round. The runs take turns, so that what else the machine does hits all alike.

    The order turns round every other time: going second is no advantage. `clock`: `time.process_time` counts
    CPU seconds, which other work on the machine does not lengthen as it does the wall clock's.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in names:
            started = clock()
            runs[name]()
            found[name].append(clock() - started)
    return found


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a's time as a multiple of b's in the same round.

    >>> ratio([2.0, 40.0, 3.0], [1.0, 20.0, 1.0])
    2.0
    """
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def median_ms(seconds: Sequence[float]) -> str:
    """The median in milliseconds.

    >>> median_ms([0.001, 0.002, 0.009])
    '2 ms'
    """
    return f"{1000 * statistics.median(seconds):.3g} ms"


class OutOfTimeError(Exception):
    """A run that was stopped at its cap."""


def capped_cpu(run: Callable[[], Any], seconds: int) -> float:
    """CPU seconds that one call takes. Raises OutOfTimeError when it is stopped (POSIX, main thread)."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    started = time.process_time()
    try:
        run()
        return time.process_time() - started
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def capped(run: Callable[[], Any], seconds: int) -> float:
    """Seconds that one call takes. Raises OutOfTimeError when it is stopped (POSIX, main thread)."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    started = time.perf_counter()
    try:
        run()
        return time.perf_counter() - started
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
