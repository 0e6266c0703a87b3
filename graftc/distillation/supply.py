"""From a plan to the batches: what a part costs, and where its teacher batches come from."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.diagnostics import GraftError, fail
from graftc.distillation.activations import Activations, Batch
from graftc.distillation.advice import stage1_advice
from graftc.distillation.buffer import Disk, Memory, Shelf, Shelves
from graftc.distillation.cache import cache_key, open_cache
from graftc.distillation.generation import Generation
from graftc.distillation.held_out import HELD_MEMORY
from graftc.distillation.inputs import check_inputs
from graftc.distillation.loss import Scale
from graftc.distillation.out_of_memory import memory_told
from graftc.distillation.pending import MEMORY, SAMPLES
from graftc.distillation.planner import Choice, Costs, Wanted, bytes_of
from graftc.distillation.replay import Replay
from graftc.distillation.resident import MEASURED_STEPS, allocator_of, heap_seen
from graftc.distillation.scopes import keeping_buffers, random_of, training_only
from graftc.distillation.sizes import pass_cost, student_cost
from graftc.distillation.students import Student, losses
from graftc.distillation.targets import Cut
from graftc.distillation.work import Work

_SLACK = 1.02
"""Shards have headers, and memory comes in pages: what a place may take over the sum of the tensors."""


def costs_of(work: Work, generation: Generation, *, measured: bool = False) -> Costs:
    """What a part costs. `measured`: run one step a few times, time the last, and see what the heap takes.

    Raises GraftError (G597) where the teacher or a student cannot run on fake tensors.
    """
    setting, students = generation.setting, generation.students
    cuts = tuple(dict.fromkeys(s.site.teacher for s in students))
    own = len(generation.rows)
    one = setting.data.prepared(setting.task, 0, 1, generation.phase).to(setting.device).inputs
    check_inputs(one, setting.inputs, "the first sample")
    trained = [s for s in students if s.parameters and generation.plans[s.site.name].steps]
    try:
        teacher = pass_cost(generation.teacher, cuts, one, own)
        with _untouched(trained):
            student = student_cost(trained, teacher.layout, setting.device, _loss)
    except GraftError:
        raise
    except Exception as error:  # whatever a model's forward raises on a fake tensor
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail("G597", f"the sizes of a step cannot be computed: {first}", site=students[0].site.name,
             help="without --reuse, --cache, --memory and --dry-run nothing needs to be computed")  # fmt: skip
    parameters = [p for s in trained for p in s.parameters.values()]
    matrices = sum(p.nbytes for p in parameters if setting.optimiser == "muon" and p.ndim == 2)
    total = sum(p.nbytes for p in parameters)
    batch_bytes = teacher.layout.nbytes(cuts)
    sample = batch_bytes / own
    held = len(setting.data.held_out) / setting.ranks.size * sample
    waiting = [s for s in students if s.site.pending]
    solve = min(MEMORY, min(setting.data.size or SAMPLES, SAMPLES) * sample) if waiting else 0
    costs = Costs(
        tuple(s.site.name for s in students),
        generation.batch,
        max((generation.plans[s.site.name].steps for s in trained), default=0),
        setting.data.size,
        teacher,
        student,
        bytes_of(setting.teacher, work.student, *(c.model for c in work.candidates.values())),
        2 * total + matrices + 2 * (total - matrices),
        int(min(held, HELD_MEMORY)),
        int(solve),
        allocator=allocator_of(setting.device),
    )
    if not measured:
        return costs
    with (
        memory_told(costs.sites[0], lambda: stage1_advice(costs, None)),
        heap_seen(costs.allocator) as seen,
    ):
        seconds = _seconds(generation, trained)
        return replace(costs, seconds=seconds, allocator=seen())


@contextmanager
def _untouched(trained: list[Student]) -> Generator[None]:
    """Only these students' parameters take gradients, and a step leaves nothing in their buffers."""
    with training_only(trained), keeping_buffers(*(s.region for s in trained)):
        yield


def _loss(students: Any, values: Any, scales: Any = None) -> Tensor:
    # Any scale that is not zero has the same cost.
    known = {s.site.name: Scale(1.0, 1.0) for s in students}
    return torch.stack(losses(students, values, known)).sum()


def _seconds(generation: Generation, trained: list[Student]) -> tuple[float, float]:
    """Seconds of a teacher pass, and of the students' forward and backward passes."""
    found = (0.0, 0.0)
    setting = generation.setting
    with _untouched(trained), random_of(setting.seed, "measure", device=setting.device):
        for _ in range(MEASURED_STEPS):
            prepared = generation.train_batch(0, generation.phase)
            start = _now(setting.device)
            values = generation.values(trained, prepared, "step 0")
            middle = _now(setting.device)
            if trained:
                parameters = [p for s in trained for p in s.parameters.values()]
                torch.autograd.grad(_loss(trained, values), parameters, allow_unused=True)
            found = (middle - start, _now(setting.device) - middle)
    return found


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def supply(
    generation: Generation, costs: Costs, made: Choice, wanted: Wanted, folder: Path
) -> Activations:
    """The batches of a part as the plan has it; `folder` is for batches that spill to disk."""
    setting = generation.setting
    if made.mode == "stream":
        return generation.activations
    layout = costs.teacher.layout
    places: list[Shelf] = []
    if made.mode == "cache":
        assert wanted.cache is not None
        key = cache_key(setting.teacher, setting.data, setting.task, phase=generation.phase,
                        batch=generation.batch, device=setting.device)  # fmt: skip
        if setting.ranks.size > 1:
            key["rows"] = [generation.rows.start, generation.rows.stop]
        home = wanted.cache / _folder(generation)
        limit = (
            wanted.disk if wanted.disk is not None else shutil.disk_usage(wanted.cache.parent).free
        )
        disk, layout = open_cache(home, key, layout, int(limit))
        places.append(disk)
    else:
        for kind, size in made.places.items():
            room = math.ceil(size * _SLACK) + 2**16
            if kind == "disk":
                places.append(Disk(fresh_folder(folder), room))
            else:
                places.append(Memory("cpu" if kind == "memory" else setting.device, room))

    def fresh(cuts: Any, number: int) -> Batch:
        chosen: tuple[Cut, ...] = tuple(cuts)
        prepared = generation.train_batch(number, generation.phase)
        return generation.teacher.run(chosen, prepared, f"teacher batch {number}")

    return Replay(
        fresh,
        made.window,
        Shelves(places),
        layout,
        (setting.seed, generation.phase),
        generation.batch,
        generation.rows if setting.ranks.size > 1 else None,
        device=setting.device,
        cache=made.mode == "cache",
    )


def _folder(generation: Generation) -> str:
    """A generation's folder in the cache; some of its sites, or some rows of its batches, have their own."""
    sites = {s.site.name.partition("/")[0] for s in generation.students}
    phase, rows = generation.phase, generation.rows
    if len(rows) < generation.batch:
        phase += f".rows-{rows.start}-{rows.stop}"
    if not generation.partial:
        return phase
    return f"{phase}-{re.sub(r'[^A-Za-z0-9_.+-]', '_', '+'.join(sorted(sites)))}"


def fresh_folder(folder: Path) -> Path:
    """An empty folder: what an interrupted run left is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
