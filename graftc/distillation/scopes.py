"""Settings that hold for a while and are then put back: threads, randomness, what takes gradients."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from graftc.diagnostics import fail
from graftc.distillation.sources import seed_of, seeded
from graftc.distillation.students import Student
from graftc.program.dropout_rate import KEPT


@contextmanager
def using_threads(count: int) -> Generator[None]:
    """torch with `count` CPU threads: sums are split among them, so the bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_device(device: str) -> str:
    """The device, once a tensor could be put there. Raises GraftError (G568), before anything is written.

    >>> usable_device("cpu")
    'cpu'
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        here = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
        fail("G568", f"this torch cannot use the device `{device}`", site="--device",
             wanted=" or ".join(["cpu", *here]), found=first)  # fmt: skip
    return device


@contextmanager
def random_of(*key: int | str, device: str = "cpu") -> Generator[None]:
    """torch's global generators, of the CPU and of `device`, as a function of `key`, and as they were afterwards (dropout)."""
    with torch.random.fork_rng(devices=[]), _random_of_device(seed_of(*key), torch.device(device)):
        torch.set_rng_state(seeded(*key).get_state())
        yield


@contextmanager
def _random_of_device(seed: int, device: torch.device) -> Generator[None]:
    """What a device draws is of a generator of its own, which the CPU's state does not reach."""
    if device.type == "cpu":
        yield
        return
    own = torch.get_device_module(device)
    with _current(own, device):
        before = own.get_rng_state()
        own.manual_seed(seed)
    try:
        yield
    finally:
        with _current(own, device):
            own.set_rng_state(before)


def _current(own: Any, device: torch.device) -> AbstractContextManager[Any]:
    """`device` as the one that its module's functions mean, where it has a number."""
    return nullcontext() if device.index is None else own.device(device.index)


@contextmanager
def keeping_buffers(*modules: nn.Module) -> Generator[None]:
    """What steps write into buffers inside (BatchNorm's means and counts) is undone; fake tensors write counts too."""
    kept = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


_TRIM, _MMAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""

_DEFAULT = 128 * 2**10
MOST_HEAP, _MOST_KEPT = 32 * 2**20, 2**31 - 1


@contextmanager
def keeping_freed_memory() -> Generator[None]:
    """What a step frees stays with the process for the next step, which needs as much again.

    glibc gives the top of its heap back to the system whenever a step ends, and takes it anew page by page: 4 ms of
    the 90 ms that a step of `benchmarks/overhead.py` takes. Nothing is changed where the C library has no `mallopt`, or
    where the user has set glibc's thresholds in the environment.
    """
    tune = _mallopt()
    if tune is None:
        yield
        return
    tune(_MMAP, MOST_HEAP)
    tune(_TRIM, _MOST_KEPT)
    try:
        yield
    finally:
        tune(_TRIM, _DEFAULT)


def give_back_freed_memory() -> None:
    """Let the system have what glibc's heap holds and nobody uses: between two phases that need other sizes."""
    if heap_is_tuned():
        ctypes.CDLL(None).malloc_trim(0)


def heap_is_tuned() -> bool:
    """Whether `keeping_freed_memory` changes anything here."""
    return _mallopt() is not None


def _mallopt() -> Callable[[int, int], int] | None:
    own = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if own or not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)


def without_dropout(student: nn.Module) -> list[tuple[nn.Module, float]]:
    """Stage 1 fits the teacher's values, which have no dropout: the original's in the student drops nothing from now on.

    What an operator brought drops as its author wrote it. Returned are the modules with their rates, to put these back.
    """
    rates = [(m, float(m.p)) for m in student.modules() if getattr(m, KEPT, False)]  # type: ignore[arg-type]
    for module, _ in rates:
        module.p = 0.0  # type: ignore[assignment]
    return rates


@contextmanager
def training_only(students: Sequence[Student]) -> Generator[None]:
    """Only these students' parameters take gradients."""
    regions = [p for s in students for p in s.region.parameters()]
    chosen = {id(p) for s in students for p in s.parameters.values()}
    before = [p.requires_grad for p in regions]
    try:
        for parameter in regions:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in zip(regions, before, strict=True):
            parameter.requires_grad_(flag)
