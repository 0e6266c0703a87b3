"""From bytes of tensors to bytes that the system counts for the process (its resident memory).

On a CPU a tensor of 32 MiB or more is mapped: it takes its own pages, and they go back when it is freed. A smaller one is
cut out of the C library's heap, which keeps holes between those that live, and which graftc lets keep what a step frees
(`scopes.keeping_freed_memory`): there, what a step needs at most is taken `HOLES` times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from graftc.distillation.scopes import MOST_HEAP, heap_is_tuned

CODE = 32 * 10**6
"""What a run takes beside tensors: pages of torch's and Python's own code that are read the first time, and their data."""

HOLES = 1.8
"""How much glibc's heap grows for a byte of the tensors that come and go in it; measured (`benchmarks/memory.py`)."""


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

    def resident(self, stays: int, passing: Sequence[Bytes]) -> int:
        """Bytes at most: of what stays all the time, and of what comes and goes, in one of several ways at a time."""
        small = max(b.small for b in passing)
        large = max(b.alive - b.small for b in passing)
        return self.code + stays + large + round(self.holes * small)


def allocator_of(device: str) -> Allocator:
    """As it is on this machine. On a GPU torch's own allocator is taken to keep no holes, which was not measured."""
    if torch.device(device).type != "cpu":
        return Allocator()
    return Allocator(CODE, HOLES if heap_is_tuned() else 1.0)


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
