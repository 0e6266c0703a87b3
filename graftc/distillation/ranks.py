"""The processes of one job, as `torchrun` or `accelerate launch` started them, and how they end together.

Rank and world size come from the environment; torch.distributed does the rest (gloo on a CPU, NCCL on
CUDA). One process alone is a job too (`ALONE`), and then nothing here communicates. What ranks tell each
other is tensors and JSON: nothing is pickled.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.distillation.scopes import usable_device

TIMEOUT = "GRAFTC_RANK_TIMEOUT"
"""The environment variable for the seconds that a rank waits for another."""

_SECONDS = 600.0
_BUCKET = 64 * 2**20
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "failed"
_meetings = itertools.count()
_last: dict[int, float] = {}
_here: list[Ranks] = []


class LostError(RuntimeError):
    """Another rank ended, or did not answer in time."""


class QuietExit(SystemExit):
    """This rank ends because another one failed, which says why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; `device` is where its tensors are.

    >>> ranks = Ranks(rank=1, size=3)
    >>> ranks.rows(8), ranks.first
    (range(2, 5), False)
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes shared files and speaks."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """This rank's share of so many rows, in one piece; shares differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def enough(self, batch: int) -> None:
        """Raise GraftError (G578) for a batch that has no row for each rank."""
        if self.size > batch:
            fail("G578", f"a batch of {batch} cannot be shared among {self.size} ranks", site="--batch",
                 wanted=f"at least {self.size} samples", found=str(batch),
                 help="give a larger --batch, or start fewer ranks")  # fmt: skip

    def key(self) -> tuple[int, ...]:
        """What seeds of random layers (dropout) have beside their step: other rows, other draws."""
        return (self.rank,) if self.size > 1 else ()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place, in buckets of one dtype."""
        if self.size == 1 or not tensors:
            return
        with _answered():
            started: list[tuple[Any, Tensor, list[Tensor]]] = []
            for part in _buckets(tensors):
                flat = torch.cat([t.detach().reshape(-1) for t in part])
                started.append((dist.all_reduce(flat, async_op=True), flat, part))
            for work, flat, part in started:
                work.wait()
                sums = flat.split([t.numel() for t in part])
                for tensor, total in zip(part, sums, strict=True):
                    tensor.detach().copy_(total.view_as(tensor))

    def total(self, numbers: Sequence[Sequence[float]]) -> list[list[float]]:
        """Sums over the ranks, in float64, of a table that has the same shape in each."""
        if self.size == 1 or not numbers:
            return [list(row) for row in numbers]
        table = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.add([table])
        return table.tolist()

    def add_gradients(
        self, parameters: Sequence[nn.Parameter], beside: Sequence[Tensor] = ()
    ) -> None:
        """Sum gradients over the ranks; one that no rank has stays absent. `beside`: tensors to sum too."""
        if self.size == 1:
            return
        with torch.no_grad():
            has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
            made = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            self.add([*made, has, *beside])
            for parameter, gradient, found in zip(parameters, made, has.tolist(), strict=True):
                parameter.grad = gradient if found else None

    def spread(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        """Give every rank the owner's values, in place."""
        if self.size == 1 or not tensors:
            return
        with _answered(), torch.no_grad():
            for part in _buckets(tensors):
                flat = torch.cat([t.detach().reshape(-1) for t in part])
                dist.broadcast(flat, owner)
                for tensor, value in zip(part, flat.split([t.numel() for t in part]), strict=True):
                    tensor.detach().copy_(value.view_as(tensor))

    def share(self, value: Any = None, owner: int = 0) -> Any:
        """The owner's plain data, in every rank."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == owner else b""
        with _answered():
            length = torch.tensor([len(text)], device=self.device)
            dist.broadcast(length, owner)
            found = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
            if self.rank == owner:
                found.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(found, owner)
        return json.loads(bytes(found.cpu().tolist()))

    def beat(self) -> None:
        """Show the ranks that wait in `meet` that this one is at work; about once a second is enough."""
        if self.store is not None and time.monotonic() - _last.get(self.rank, 0.0) > 1.0:
            _last[self.rank] = time.monotonic()
            with _answered():
                self.store.set(f"beat/{self.rank}", str(_last[self.rank]))

    def meet(self) -> None:
        """Wait, as long as it takes, for ranks that worked apart; one that shows no life is lost."""
        if self.size == 1:
            return
        mark, limit = f"meeting/{next(_meetings)}", seconds()
        with _answered():
            self.store.set(f"{mark}/{self.rank}", "")
            alive = {rank: ("", time.monotonic()) for rank in range(self.size)}
            while away := [r for r in alive if not self.store.check([f"{mark}/{r}"])]:
                if self.store.check([_FAILED]):
                    raise LostError("another rank failed")
                for rank in away:
                    key = f"beat/{rank}"
                    beat = self.store.get(key).decode() if self.store.check([key]) else ""
                    if beat != alive[rank][0]:
                        alive[rank] = beat, time.monotonic()
                    elif time.monotonic() - alive[rank][1] > limit:
                        raise LostError(f"rank {rank} has shown no life for {limit:.0f} s")
                time.sleep(0.02)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.add([torch.zeros(1, device=self.device)])


ALONE = Ranks()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups of one dtype and of a size that a network likes, in order."""
    made: list[list[Tensor]] = []
    room: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        part, used = room.get(tensor.dtype, ([], _BUCKET))
        if used + tensor.nbytes > _BUCKET:
            part, used = [], 0
            made.append(part)
        part.append(tensor)
        room[tensor.dtype] = part, used + tensor.nbytes
    return made


@contextmanager
def _answered() -> Generator[None]:
    """What torch.distributed raises where a rank is gone, as `LostError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(str(error)) from error


def launched() -> bool:
    """Whether a launcher started several processes of this job.

    >>> launched()
    False
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process is the one that prints: rank 0, or the only one."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def seconds() -> float:
    """How long a rank waits for another. Raises GraftError (G578) for a variable that is no number."""
    text = os.environ.get(TIMEOUT, str(_SECONDS))
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        fail("G578", f"{TIMEOUT} is no number of seconds", site=TIMEOUT, wanted="a number above 0",
             found=text)  # fmt: skip
    return found


def device_of(device: str) -> str:
    """The device of this rank: of `cuda`, the card that the launcher gave it."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def joined(device: str = "cpu") -> Generator[Ranks]:
    """This process's rank, and the job's process group for as long as it lasts.

    A group that is there is used. One failure ends the job: the first rank that fails says so, with its
    number; the others leave without a word. A rank that does not answer is an error (G579) after
    `GRAFTC_RANK_TIMEOUT` seconds (600).
    """
    if not launched():
        yield ALONE
        return
    device = device_of(device)
    if dist.is_initialized():
        store = _here[-1].store if _here else None
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, store)
        return
    waiting = timedelta(seconds=seconds())
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    try:
        found: Any = next(iter(dist.rendezvous("env://", timeout=waiting)))
    except RuntimeError as error:
        _lost(ranks, error)
    store = dist.PrefixStore("graftc", found[0])
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        usable_device(device)
        if backend == "nccl":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=ranks.rank,
            world_size=ranks.size, timeout=waiting,
        )  # fmt: skip
        _here.append(replace(ranks, store=store))
        yield _here[-1]
    except BaseException as error:
        _end(ranks, store, error)
    finally:
        _here.clear()
        if backend == "gloo" and dist.is_initialized():  # NCCL's would wait for ranks that are gone
            with suppress(RuntimeError):
                dist.destroy_process_group()
    if backend == "nccl":
        dist.destroy_process_group()


def _end(ranks: Ranks, store: Any, error: BaseException) -> NoReturn:
    """Raise what this rank has to say: its own failure, or nothing where another one spoke first."""
    spoken = False
    with suppress(RuntimeError):
        spoken = store.add(_FAILED, 1) > 1
    if spoken:
        raise QuietExit(getattr(error, "exit_code", 1)) from None
    if isinstance(error, GraftError):
        raise type(error)(*(_at(d, ranks) for d in error.diagnostics)) from error
    if _is_lost(error):
        _lost(ranks, error)
    error.add_note(f"on {_name(ranks)}")
    raise error


def _name(ranks: Ranks) -> str:
    return f"rank {ranks.rank} of {ranks.size} ({platform.node()}, process {os.getpid()})"


def _at(diagnostic: Diagnostic, ranks: Ranks) -> Diagnostic:
    return replace(diagnostic, notes=(*diagnostic.notes, Note(f"on {_name(ranks)}")))


_WORDS = re.compile(r"gloo|nccl|process ?group|connection (closed|reset)|timed out|store", re.I)


def _is_lost(error: BaseException) -> bool:
    """Whether torch.distributed says it, from its own calls or from inside a backward pass."""
    return isinstance(error, LostError) or (
        isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None
    )


def _lost(ranks: Ranks, error: BaseException) -> NoReturn:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    told = Diagnostic("G579", "another rank of the job ended, or did not answer in time", site="torchrun",
                      found=first, notes=(Note(f"seen by {_name(ranks)}"), Note("the last checkpoint is whole")),
                      help=f"the launcher's own lines say which; then `--resume ID`, with as many ranks as you like. "
                           f"{TIMEOUT} is the wait, {seconds():.0f} s")  # fmt: skip
    raise GraftError(told) from error


def in_order(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Run `work` in rank 0, then in the others, which find what it made."""
    made = work() if ranks.first else None
    ranks.barrier()
    return made if ranks.first else work()


def same(ranks: Ranks, what: str, value: Mapping[str, Any]) -> None:
    """Raise GraftError (G578) where a rank was given other options than rank 0."""
    theirs = ranks.share(dict(value))
    for name, wanted in theirs.items():
        if json.loads(json.dumps(value.get(name))) != wanted:
            fail("G578", f"the ranks of a job need the same {what}: `{name}` differs", site=what,
                 wanted=repr(wanted), found=repr(value.get(name)))  # fmt: skip
