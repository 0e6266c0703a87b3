"""What a run of stage 1 will take, before it starts: mode, reuse, place, time, memory and disk.

The mode is stream (each teacher batch is used once), replay (a window of batches is kept and used R
times) or cache (all batches of one pass over DATA are kept on disk). Bytes and FLOPs are computed from
fake tensors; seconds come from one step that was run.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graftc.diagnostics import Diagnostic, Note, fail, to_json
from graftc.distillation.replay import Window
from graftc.distillation.resident import Allocator, Bytes
from graftc.distillation.sizes import Layout, PassCost, StudentCost
from graftc.units import size_text

Mode = Literal["stream", "replay", "cache"]
MOST_KEPT = 64
"""Batches in a window at most: more mix no better, and are longer in use."""

MOST_REUSE = 8
VALIDATIONS = 9


@dataclass(frozen=True)
class Wanted:
    """What the user asked for. `memory`: bytes that the run may take in all; `disk`: of kept batches.

    `reuse` None streams, or with `cache` reads DATA once; "auto" chooses from the FLOPs.
    """

    reuse: int | Literal["auto"] | None = None
    memory: int | None = None
    disk: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Machine:
    """Free bytes: of the device (0: it is the CPU), of memory, and of the disk that batches go to."""

    device: int
    memory: int
    disk: int

    @staticmethod
    def read(device: str, folder: Path) -> Machine:
        """What is free, for one of the processes that the launcher started here."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        own = 0
        if torch.device(device).type == "cuda":
            own = torch.cuda.mem_get_info(device)[0]
        while not folder.exists():
            folder = folder.parent
        return Machine(own, available_memory() // here, shutil.disk_usage(folder).free // here)


def available_memory() -> int:
    """Bytes of memory that a process can still take: Linux's own figure; elsewhere half of all there is.

    Raises GraftError (G590) where the system tells neither.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        fail("G590", "the system does not tell how much memory there is", site="--memory",
             help="give --memory")  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """What one group of sites that train together costs; bytes, FLOPs, and seconds where measured.

    `state`: gradients, optimiser and best weights. `held`: activations of the held-out samples that are
    kept, `solve`: those that first weights are solved from.
    """

    sites: tuple[str, ...]
    batch: int
    steps: int
    samples: int | None
    teacher: PassCost
    student: StudentCost
    weights: int
    state: int
    held: int
    solve: int = 0
    seconds: tuple[float, float] | None = None
    allocator: Allocator = field(default_factory=Allocator)

    @property
    def kept(self) -> int:
        """Bytes of one teacher batch: the inputs and the values of all cuts."""
        return self.one_batch.alive

    @property
    def one_batch(self) -> Bytes:
        layout: Layout = self.teacher.layout
        return layout.amount(tuple(layout.places))


@dataclass(frozen=True)
class Choice:
    """How one group gets its teacher batches, and what that takes. `places`: bytes of batches by place.

    `tensors`: bytes of tensors alive at most; `peak`: what the device's memory has of them, holes and all.
    """

    mode: Mode
    window: Window
    places: Mapping[str, int]
    passes: int
    tensors: int
    peak: int
    disk: int
    seconds: float | None

    @property
    def reuse(self) -> int:
        return self.window.reuse

    def keeping(self, window: Window, costs: Costs) -> Choice:
        """The same with another window: what a run began with, resumed where more or less is free."""
        if window == self.window:
            return self
        mode: Mode = "replay" if window.reuse > 1 else "stream"
        if self.mode == "cache":
            mode = "cache"
        places = {} if mode == "stream" else dict(self.places)
        lacking = window.batches * costs.kept - sum(places.values())
        if mode != "stream" and lacking > 0:
            place = "disk" if mode == "cache" else next(iter(places), "memory")
            places[place] = places.get(place, 0) + lacking
        return choice(costs, mode, window, places)


def peak(costs: Costs, kept: int, reuse: int, allocator: Allocator | None = None) -> int:
    """Bytes that a group takes at most on the device, where `kept` bytes of batches are there too.

    `allocator`: the group's own if None; `Allocator()` counts tensors alone.
    """
    batch = costs.one_batch
    own = 0 if reuse == 1 else kept
    # The batch in use is among the kept ones when it is new, and a mixture of them afterwards.
    ways = [costs.teacher.peak, batch + costs.student.peak, batch + costs.student.evaluation]
    solving = Bytes(costs.solve) + max(costs.teacher.peak, costs.student.evaluation, key=_alive)
    stays = costs.weights + costs.state + costs.held + own
    return (allocator or costs.allocator).resident(stays, [*ways, solving])


_AROUND = 2**16
"""Bytes that Linux maps of a file where one is read."""


def _read(costs: Costs, disk: int) -> int:
    """Pages of shards that a step reads: a row of each sample, and what is mapped around it."""
    if not disk or not costs.allocator.code:  # on a GPU, they are not in its memory
        return 0
    batches = math.ceil(disk / max(1, costs.kept))
    sizes = [value.nbytes for value in costs.teacher.layout.tensors.values()]
    return sum(min(batches * n, max(n, costs.batch * _AROUND)) for n in sizes)


def _alive(one: Bytes) -> int:
    return one.alive


def choice(costs: Costs, mode: Mode, window: Window, places: Mapping[str, int]) -> Choice:
    """The figures of one way to train a group."""
    passes = window.passes(costs.steps)
    on_device = sum(size for name, size in places.items() if name in ("memory", "device"))
    seconds = None
    if costs.seconds is not None:
        teacher, step = costs.seconds
        measured = VALIDATIONS * math.ceil(_held_out(costs) / costs.batch)
        seconds = passes * teacher + costs.steps * step + measured * step / 3
    reuse = 1 if mode != "replay" else window.reuse
    alive = peak(costs, on_device, reuse, Allocator())
    found = peak(costs, on_device, reuse) + _read(costs, places.get("disk", 0))
    return Choice(mode, window, places, passes, alive, found, places.get("disk", 0), seconds)


def _held_out(costs: Costs) -> int:
    return min(256, max(1, (costs.samples or 640) // 9))


def choose(costs: Costs, wanted: Wanted, machine: Machine) -> Choice:
    """Mode, window and places of a group.

    What was seen while steps were run is in what is told, not in what is chosen: a dry run and a run choose the same.
    Raises GraftError: settings that make no sense (G590), or that do not fit (G592, with the next
    smaller one).
    """
    rough = replace(costs, allocator=costs.allocator.unmeasured())
    made = _chosen(rough, wanted, machine)
    return choice(costs, made.mode, made.window, made.places)


def _chosen(costs: Costs, wanted: Wanted, machine: Machine) -> Choice:
    if wanted.reuse is not None and wanted.reuse != "auto" and wanted.reuse < 1:
        fail("G590", "a teacher batch is used once at least", site="--reuse",
             found=str(wanted.reuse))  # fmt: skip
    streamed = choice(costs, "stream", Window(1, 1), {})
    if wanted.memory is not None and streamed.peak > wanted.memory and not machine.device:
        fail("G592", f"training {_sites(costs)} takes more memory than the limit, with nothing kept",
             site="--memory", wanted=f"at most {size_text(wanted.memory)}",
             found=f"{size_text(streamed.peak)} predicted", help=smaller(costs, streamed))  # fmt: skip
    if wanted.cache is not None:
        return _cached(costs, wanted, machine)
    if wanted.reuse == "auto":
        reuse = natural_reuse(costs)
        made = _replayed(costs, reuse, wanted, machine) if reuse > 1 else None
        return made or streamed
    if wanted.reuse is None or wanted.reuse == 1:
        return streamed
    made = _replayed(costs, wanted.reuse, wanted, machine)
    if made is None:
        fail("G592", f"two batches of the teacher's values of {_sites(costs)} fit nowhere",
             site="--reuse", wanted=f"{size_text(2 * costs.kept)} within --memory or --disk",
             help=smaller(costs, choice(costs, "replay", Window(2, wanted.reuse), {})))  # fmt: skip
    return made


def natural_reuse(costs: Costs) -> int:
    """The least reuse (1, 2, 4, 8) with which the teacher's work is no more than the students'."""
    reuse = 1
    while reuse < MOST_REUSE and costs.teacher.flops > reuse * costs.student.flops:
        reuse *= 2
    return reuse


def _cached(costs: Costs, wanted: Wanted, machine: Machine) -> Choice:
    number = costs.steps
    if isinstance(wanted.reuse, int):
        number = math.ceil(costs.steps / wanted.reuse)
    elif costs.samples is not None:
        number = min(costs.steps, math.ceil(costs.samples / costs.batch))
    number = max(1, number)
    window = Window(number, max(1, math.ceil(costs.steps / number)))
    made = choice(costs, "cache", window, {"disk": number * costs.kept})
    limit = wanted.disk if wanted.disk is not None else machine.disk
    if made.disk > limit:
        fit = int(limit // costs.kept)
        notes = (Note(f"one batch is {size_text(costs.kept)}"),)
        more = (
            f"--reuse {math.ceil(costs.steps / fit)} takes {size_text(fit * costs.kept)}"
            if fit
            else "stream: leave --cache out"
        )
        fail("G592", f"the cache of {_sites(costs)} does not fit on the disk", site="--cache",
             wanted=f"at most {size_text(int(limit))}", found=f"{size_text(made.disk)} predicted",
             notes=notes, help=more)  # fmt: skip
    return made


def _replayed(costs: Costs, reuse: int, wanted: Wanted, machine: Machine) -> Choice | None:
    """The largest window up to 64 batches, on the device, then in memory, then on disk; None below two."""
    streamed = peak(costs, 0, 1)
    rooms: dict[str, int] = {}
    if machine.device:
        rooms["device"] = max(0, int(0.9 * machine.device) - streamed)
        rooms["memory"] = wanted.memory if wanted.memory is not None else machine.memory // 2
    else:
        free = machine.memory // 2 if wanted.memory is None else wanted.memory - streamed
        rooms["memory"] = max(0, free - costs.kept)
    rooms["disk"] = wanted.disk or 0
    most = min(MOST_KEPT, math.ceil(costs.steps / reuse))
    fit = sum(room // costs.kept for room in rooms.values())
    number = min(most, fit)
    if number < min(2, most):
        return None
    windows = math.ceil(costs.steps / (reuse * number))
    number = math.ceil(costs.steps / (reuse * windows))
    places: dict[str, int] = {}
    left = number
    for place, room in rooms.items():
        here = min(left, room // costs.kept)
        left -= here
        if here:
            places[place] = here * costs.kept
    return choice(costs, "replay", Window(number, reuse), places)


def smaller(costs: Costs, current: Choice) -> str:
    """The next smaller setting, and what it is predicted to take."""
    batch = Window(1, 1)
    if current.mode == "replay" and current.window.batches > 2:
        half = current.window.batches // 2
        there = peak(costs, half * costs.kept, current.reuse)
        return f"--reuse {current.reuse} --memory {size_text(there).replace(' ', '')} keeps {half} batches, not {current.window.batches}"
    if current.mode == "replay":
        streamed = choice(costs, "stream", batch, {})
        return f"leave --reuse out: with nothing kept, {size_text(streamed.peak)}"
    if len(costs.sites) > 1:
        return "--site-by-site: one site's values and gradients at a time"
    if costs.batch > 1:
        return f"--batch {costs.batch // 2}: about {size_text(costs.weights + (current.peak - costs.weights) // 2)}"
    return "a machine with more memory: this is one site and one sample"


def _sites(costs: Costs) -> str:
    first = costs.sites[0] if costs.sites else "nothing"
    return f"`{first}`" + (f" and {len(costs.sites) - 1} more" if len(costs.sites) > 1 else "")


@dataclass(frozen=True)
class TrainingPlan:
    """A run of stage 1 as it was planned: the groups that train together, in order."""

    groups: tuple[tuple[Costs, Choice], ...]
    machine: Machine
    ranks: str = ""
    """How the processes of the job share the work; the figures are of one of them."""
    warnings: tuple[Diagnostic, ...] = ()
    """What to know of DATA before it starts."""

    @property
    def peak(self) -> int:
        return max((c.peak for _, c in self.groups), default=0)

    @property
    def disk(self) -> int:
        return sum(c.disk for _, c in self.groups)

    @property
    def seconds(self) -> float | None:
        found = [c.seconds for _, c in self.groups]
        return None if any(s is None for s in found) else sum(s for s in found if s is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: bytes, seconds, FLOPs."""
        return {
            "seconds": self.seconds,
            "peak_memory": self.peak,
            "disk": self.disk,
            "machine": asdict(self.machine),
            "groups": [_group(costs, made, self.machine) for costs, made in self.groups],
            "warnings": [to_json(d) for d in self.warnings],
        }


def _group(costs: Costs, made: Choice, machine: Machine) -> dict[str, Any]:
    return {
        "sites": list(costs.sites),
        "steps": costs.steps,
        "batch": costs.batch,
        "mode": made.mode,
        "reuse": made.reuse,
        "kept_batches": made.window.batches if made.mode != "stream" else 0,
        "places": dict(made.places),
        "teacher_passes": made.passes,
        "peak_memory": made.peak,
        "peak_tensors": made.tensors,
        "disk": made.disk,
        "seconds": made.seconds,
        "batch_bytes": costs.kept,
        "teacher_flops": costs.teacher.flops,
        "student_flops": costs.student.flops,
        "others": [_row(other) for other in others(costs, machine)],
    }


def _row(made: Choice) -> dict[str, Any]:
    return {"mode": made.mode, "reuse": made.reuse, "teacher_passes": made.passes,
            "peak_memory": made.peak, "disk": made.disk, "seconds": made.seconds}  # fmt: skip


def others(costs: Costs, machine: Machine) -> Sequence[Choice]:
    """The ways there are, to be shown beside the one that is taken; none for sites that take no steps."""
    if not costs.steps:
        return ()
    found = [choice(costs, "stream", Window(1, 1), {})]
    for reuse in (2, 4, 8):
        made = _replayed(costs, reuse, Wanted(), machine)
        if made is not None:
            found.append(made)
    number = costs.steps if costs.samples is None else math.ceil(costs.samples / costs.batch)
    number = max(1, min(costs.steps, number))
    window = Window(number, max(1, math.ceil(costs.steps / number)))
    found.append(choice(costs, "cache", window, {"disk": number * costs.kept}))
    return found


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    found = {
        t.untyped_storage().data_ptr() or id(t): t.untyped_storage().nbytes()
        for module in modules
        for t in (*module.parameters(), *module.buffers())
    }
    return sum(found.values())
