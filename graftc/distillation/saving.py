"""When a checkpoint is due, and small things that both stages share around it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

CHECKPOINT_SECONDS = 60.0


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def silent(phase: str, done: int, total: int, values: Mapping[str, float]) -> None:
    pass


class Saver:
    """Says when a checkpoint is due: every so many steps, or every minute."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        if time.monotonic() - self._last < CHECKPOINT_SECONDS:
            return False
        self._last = time.monotonic()
        return True
