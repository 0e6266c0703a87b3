"""One pass of the model over samples of DATA measures every site; what was measured before is read from a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import Diagnostic, GraftError
from graftc.distillation.data import Task
from graftc.measures.cache import content_key, default_cache, read, write
from graftc.measures.observers import (
    InfluenceObserver,
    LocalityObserver,
    Observer,
    StatisticsObserver,
)
from graftc.measures.places import Places, observed, places
from graftc.measures.samples import Batches, batches
from graftc.program.analysis import Analysis
from graftc.program.measured import FAMILY, MeasuredOn, SiteMeasures, Statistics

DEFAULT_SAMPLES = 64
FAMILIES = tuple(dict.fromkeys(FAMILY.values()))

__all__ = ["DEFAULT_SAMPLES", "FAMILIES", "Measuring", "default_cache", "measure"]


@dataclass(frozen=True)
class Measuring:
    """What to measure on: DATA and a Task (objects), how many samples, the seed, a folder for the cache (None: none).

    `data_name` and `task_name` are what a reader is told.
    """

    data: Any
    task: Task
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    cache: Path | None = None
    data_name: str = "DATA"
    task_name: str = "the task"


def measure(analysis: Analysis, on: Measuring, families: Sequence[str] = FAMILIES) -> Analysis:
    """The same Analysis with the measures of `families` at its sites, and what they were made on.

    The model's weights must be there. Raises GraftError: DATA or the Task's inputs do not fit (G493, G495, G520 …
    G533), the teacher gives what is not finite (G489) or cannot run (G496).
    """
    source = batches(analysis, on.data, on.task, on.samples, on.seed)
    wanted = {f: places(analysis, f) for f in families}
    names = {f: p.sites for f, p in wanted.items()}
    keys = {} if on.cache is None else content_key(analysis.program, source.draw(), names)
    kept, notes = _kept(on.cache, keys)
    said = MeasuredOn(
        source.samples,
        on.seed,
        on.data_name,
        on.task_name,
        tuple(families),
        tuple(kept),
        None if on.cache is None else str(on.cache),
        notes,
    )
    missing = {f: p for f, p in wanted.items() if f not in kept}
    if missing:
        made = _pass(analysis, source, missing)
        kept |= made
        if on.cache is not None:
            for family, values in made.items():
                write(on.cache, family, keys[family], values, _for_a_reader(on, said))
    return _with_measures(analysis, kept, wanted, said)


def _kept(
    folder: Path | None, keys: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], tuple[Diagnostic, ...]]:
    """Family → what the cache holds of it; a note for each file that is no good."""
    kept: dict[str, dict[str, Tensor]] = {}
    notes: list[Diagnostic] = []
    for family, key in keys.items():
        try:
            found = None if folder is None else read(folder, family, key)
        except GraftError as error:
            notes += [replace(d, severity="warning") for d in error.diagnostics]
            continue
        if found is not None:
            kept[family] = found
    return kept, tuple(notes)


def _for_a_reader(on: Measuring, said: MeasuredOn) -> str:
    """What a kept file says of itself; nothing is decided by it."""
    return dumps(
        {"samples": said.samples, "seed": on.seed, "data": on.data_name, "task": on.task_name}
    )


def _pass(
    analysis: Analysis, source: Batches, wanted: Mapping[str, Places]
) -> dict[str, dict[str, Tensor]]:
    """Family → site → its values, from one pass."""
    found = tuple(p for one in wanted.values() for p in one.found)
    observers = {f: list(dict.fromkeys(p.observer for p in one.found)) for f, one in wanted.items()}
    if found:
        graph = observed(analysis.program.root, found)
        device = next((p.device for p in graph.parameters()), torch.device("cpu"))
        for number, inputs in enumerate(source.draw()):
            _run(graph, [v.to(device) for v in inputs.values()], number)
    return {f: {o.site: v for o in all_ if (v := _value(o)) is not None} for f, all_ in observers.items()}  # fmt: skip


def _run(graph: nn.Module, inputs: list[Tensor], number: int) -> None:
    try:
        with torch.no_grad():
            graph(*inputs)
    except GraftError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"the teacher cannot run on batch {number} of DATA: {first}"
        raise GraftError(Diagnostic("G496", text, site="DATA")) from error


def _value(observer: Observer) -> Tensor | None:
    """What an observer found, as a tensor of float64 (a kurtosis that is not defined as NaN)."""
    if isinstance(observer, LocalityObserver):
        return observer.within()
    if isinstance(observer, InfluenceObserver):
        return torch.tensor(observer.influence(), dtype=torch.float64)
    assert isinstance(observer, StatisticsObserver)
    found = observer.statistics()
    if found is None:
        return None
    kurtosis = float("nan") if found.kurtosis is None else found.kurtosis
    return torch.tensor([found.mean, found.std, found.absmax, kurtosis], dtype=torch.float64)


def _with_measures(
    analysis: Analysis,
    values: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Places],
    said: MeasuredOn,
) -> Analysis:
    """The Analysis with the values at its sites."""

    def at(path: str) -> SiteMeasures:
        within = values.get("locality", {}).get(path)
        influence = values.get("influence", {}).get(path)
        figures = values.get("statistics", {}).get(path)
        why: dict[str, str] = {}
        for family, one in wanted.items():
            if path not in values[family]:
                why[family] = one.why.get(path, "nothing was measured there")
        return SiteMeasures(
            within,
            None if influence is None else float(influence),
            None if figures is None else _statistics(figures),
            why,
        )

    sites = tuple(replace(s, measured=at(s.path)) for s in analysis.sites)
    return replace(analysis, sites=sites, measured=said)


def _statistics(figures: Tensor) -> Statistics:
    mean, std, absmax, kurtosis = figures.tolist()
    return Statistics(mean, std, absmax, None if kurtosis != kurtosis else kurtosis)
