"""Measured selectors: what a file's rules ask of DATA is measured on the model before they are matched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftc.diagnostics import fail
from graftc.language.rules import Rules
from graftc.measures import DEFAULT_SAMPLES, Measuring, default_cache, measure
from graftc.program.analysis import Analysis
from graftc.program.model import Model
from graftc.rewrite.measured import families


def measured_for(rules: Rules, analysis: Analysis, on: Measuring | None) -> Analysis:
    """The Analysis with what the rules ask to be measured; itself where they ask for nothing, or there is no DATA.

    Without DATA the rule that asks is refused where it is matched (G135). Raises GraftError as `measures.measure`.
    """
    asked = families(rules)
    if not asked or on is None:
        return analysis
    return measure(analysis, on, asked)


def asks(rules: Rules) -> bool:
    """Whether a file has a measured selector. Raises GraftError for one that cannot be (G490)."""
    return bool(families(rules))


def measuring(
    model: Model,
    data: Any,
    task: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Measuring | None:
    """DATA and TASK, by name or as objects, as what to measure on; None without DATA.

    `cache`: a folder; None is the user's own (`measures.default_cache`). Raises GraftError where no Task is named (G231).
    """
    from graftc.loading import load_data, load_task

    if data is None:
        return None
    chosen = load_task(task if task is not None else model.task)
    if chosen is None:
        fail(
            "G231",
            "DATA was given, and no task that draws the model's inputs from it",
            site="-d",
            help="give -t ddpm, -t file.py:Task, or return graftc.Model(…, task = …)",
        )
    return Measuring(
        load_data(data),
        chosen,
        samples,
        seed,
        default_cache() if cache is None else Path(cache),
        _name(data),
        _name(task if task is not None else model.task),
    )


def _name(what: Any) -> str:
    return what if isinstance(what, str) else type(what).__name__
