"""From bytes of tensors to bytes that the system counts for the process (its resident memory).

On a CPU a tensor of 32 MiB or more is mapped: it takes its own pages, and they go back when it is freed. A smaller one is
cut out of the C library's heap, which keeps holes between those that live, and which graftc lets keep what a step frees
(`scopes.keeping_freed_memory`). How much of it a step takes hangs on the order of what comes and goes; it is measured where steps
are run before the prediction, and else what a step needs at most is taken `HOLES` times.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from graftc.distillation.scopes import (
    MOST_HEAP,
    give_back_freed_memory,
    heap_is_tuned,
    keeping_freed_memory,
)

CODE = 32 * 10**6
"""What a run takes beside tensors: pages of torch's and Python's own code that are read the first time, and their data.
No command prints this number or the next: both were set by hand, to fit rows of `benchmarks/memory.py` on one machine."""

HOLES = 1.8
"""How much glibc's heap grows for a byte of the tensors that come and go in it, where no step was run: rough."""

MEASURED_STEPS = 3
"""Steps that are run to time them and to see what the heap grows to; it grows little afterwards."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of tensors that are alive at most; `small`: of those that are cut out of a heap, at most."""

    alive: int
    small: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.alive + other.alive, self.small + other.small)


@dataclass(frozen=True)
class Allocator:
    """What a device's allocator makes of tensors.

    >>> Allocator(code=10, holes=2.0).resident(100, [Bytes(50, small=40), Bytes(60)])
    250
    """

    code: int = 0
    holes: float = 1.0
    heap: int | None = None
    """What the heap was seen to grow to while steps were run; None where none was."""

    def resident(self, stays: int, passing: Sequence[Bytes]) -> int:
        """Bytes at most: of what stays all the time, and of what comes and goes, in one of several ways at a time."""
        small = max(b.small for b in passing)
        large = max(b.alive - b.small for b in passing)
        heap = round(self.holes * small) if self.heap is None else max(self.heap, small)
        return self.code + stays + large + heap

    def unmeasured(self) -> Allocator:
        """For other steps than those that were run."""
        return replace(self, heap=None)


def allocator_of(device: str) -> Allocator:
    """As it is on this machine. On a GPU torch's own allocator is taken to keep no holes, which was not measured."""
    if torch.device(device).type != "cpu":
        return Allocator()
    return Allocator(CODE, HOLES if heap_is_tuned() else 1.0)


@contextmanager
def heap_seen(allocator: Allocator) -> Generator[Callable[[], Allocator]]:
    """Steps are run inside; what is yielded gives `allocator` with what the heap grew to by then."""
    if allocator.holes == 1.0:  # of no heap that keeps holes
        yield lambda: allocator
        return
    give_back_freed_memory()
    before = _own_pages()

    def seen() -> Allocator:
        now = _own_pages()
        if before is None or now is None:
            return allocator
        return replace(allocator, heap=max(0, now - before))

    with keeping_freed_memory():
        yield seen


def _own_pages() -> int | None:
    """Bytes in memory of this process that are of no file; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def bytes_of_sizes(sizes: Iterable[int]) -> Bytes:
    """Of tensors that are alive together.

    >>> bytes_of_sizes([10, 10**9])
    Bytes(alive=1000000010, small=10)
    """
    found = list(sizes)
    return Bytes(sum(found), sum(size for size in found if is_small(size)))


def is_small(size: int) -> bool:
    """Whether a tensor of so many bytes is cut out of the heap."""
    return size < MOST_HEAP
