"""Settings that hold for a while and are then put back: threads, randomness, what takes gradients."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from graftc.diagnostics import fail
from graftc.distillation.sources import seeded
from graftc.distillation.students import Student


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
def random_of(*key: int | str) -> Generator[None]:
    """torch's global generator as a function of `key`, and as it was afterwards (dropout)."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded(*key).get_state())
        yield


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
