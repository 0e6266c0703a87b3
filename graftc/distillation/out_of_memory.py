"""Out of memory while training: what says so, and how it is told."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from graftc.diagnostics import Diagnostic, GraftError, Note

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says in a plain RuntimeError: of an accelerator's context, of the CPU, of Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the machine, has no memory left.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@contextmanager
def memory_told(site: str, advice: Callable[[], tuple[str, str]]) -> Generator[None]:
    """Tell out of memory as a diagnostic (G593); `advice` gives what was expected and the next smaller setting."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        wanted, help = advice()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        notes = (Note("the last checkpoint, where there is one, is whole"),)
        told = Diagnostic("G593", "out of memory", site=site, wanted=wanted, found=first,
                          notes=notes, help=f"the next smaller setting: {help}")  # fmt: skip
        raise GraftError(told) from error
