"""What trains a student: its targets, the bank, stage 1 and stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftc.diagnostics import GraftError
from graftc.loading import as_build, load_data, recorded_sources, task_of

if TYPE_CHECKING:
    from graftc.distillation import RunResult
    from graftc.distillation.assemble import Assembly
    from graftc.distillation.modelopt import ModelOptConfig
    from graftc.distillation.overfit import SiteCheck
    from graftc.distillation.plain import Distillation
    from graftc.distillation.planner import TrainingPlan
    from graftc.distillation.planner2 import Stage2Plan
    from graftc.emit.build import Build


def assemble(
    build: str | Path | Build,
    bank: str | Path,
    data: str | Any = None,
    *,
    task: str | Any = None,
    command: str = "",
) -> Assembly:
    """What `bank` has for a build: where that is every site, the student is put together of it, as a finished run.

    With `data`, only what was trained on it counts. Raises GraftError.
    """
    from graftc.distillation.assemble import assemble as engine

    opened = as_build(build)
    given = None if data is None else load_data(data)
    chosen = None if data is None else task_of(opened, task)
    sources = (
        {"command": command} if data is None else recorded_sources(opened, data, task, command)
    )
    return engine(opened, bank, data=given, task=chosen, sources=sources)


def load_targets(build: str | Path | Build, *, task: str | Any = None) -> Distillation:
    """A build's distillation targets as plain PyTorch: capture, students, losses and merge, for any training loop.

    `task`: by default the build's own, where there is one. Raises GraftError.
    """
    from graftc.distillation.plain import Distillation

    opened = as_build(build)
    try:
        chosen = task_of(opened, task)
    except GraftError as error:
        if error.diagnostics[0].code != "G231":
            raise
        chosen = None  # said once it is asked for
    return Distillation(opened, chosen)


def export_targets(build: str | Path | Build, output: str | Path) -> ModelOptConfig:
    """A build's targets as a Python file for NVIDIA Model-Optimizer's layer-wise distillation, with a training loop.

    Returns the pairs of modules, and what is left out or otherwise than in `distill`. Raises GraftError where no
    site fits (G583), or the file cannot be written.
    """
    from graftc.distillation.modelopt import write_modelopt
    from graftc.distillation.plain import Distillation

    opened = as_build(build)
    return write_modelopt(Distillation(opened), opened.path, Path(output))


def check_distill(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> tuple[SiteCheck, ...]:
    """Before a long run: whether each site can learn a few samples by heart; see `graftc.distillation.overfit`."""
    from graftc.distillation.overfit import check_distill as engine

    return engine(load_targets(build, task=task), load_data(data), **options)


def distill(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> RunResult:
    """Stage 1: every learned site is trained on the teacher's activations; see `graftc.distillation.distill`."""
    from graftc.distillation import distill as engine

    return _train(engine, build, data, task, _sizes(options))


def plan_distill(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> TrainingPlan:
    """What `distill` with these options would take, in time, memory and disk; nothing is written.

    `memory` and `disk` are bytes, or text such as `8GB`. Raises GraftError, also for settings that do not fit.
    """
    from graftc.distillation import plan_distill as planned

    opened = as_build(build)
    return planned(opened, load_data(data), task_of(opened, task), **_sizes(options))


def _sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with byte limits that were given as text read."""
    from graftc.units import read_size

    limits = {"memory": "--memory", "disk": "--disk"}
    return {
        name: read_size(value, limits[name]) if name in limits and value is not None else value
        for name, value in options.items()
    }


def finetune(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> RunResult:
    """Stage 2: the student is trained end to end on the task's loss; see `graftc.distillation.finetune`."""
    from graftc.distillation import finetune as engine

    return _train(engine, build, data, task, options)


def plan_finetune(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> Stage2Plan:
    """What `finetune` with these options would take, in time, memory and disk; nothing is written. Raises GraftError."""
    from graftc.distillation import plan_finetune as planned

    opened = as_build(build)
    return planned(opened, load_data(data), task_of(opened, task), **options)


def _train(
    engine: Any, build: str | Path | Build, data: Any, task: Any, options: dict[str, Any]
) -> RunResult:
    opened = as_build(build)
    return engine(
        opened,
        load_data(data),
        task_of(opened, task),
        sources=recorded_sources(opened, data, task, str(options.pop("command", ""))),
        **options,
    )
