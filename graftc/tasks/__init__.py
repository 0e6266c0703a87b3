"""What a model is trained for. DATA yields raw samples; a Task alone draws noise, drops labels, computes the loss and samples.

Knows nothing of `.graft` files or of rewriting. `get_task("ddpm")` finds a task's class by the name a user writes.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Prepared, Task, primary
    from .causal_lm import CausalLM
    from .classification import Classification
    from .ddpm import DDPM
    from .flow import RectifiedFlow

__all__ = [
    "DDPM",
    "TASKS",
    "CausalLM",
    "Classification",
    "Prepared",
    "RectifiedFlow",
    "Task",
    "get_task",
    "primary",
]

_HOME = {
    "Prepared": "base",
    "Task": "base",
    "primary": "base",
    "DDPM": "ddpm",
    "RectifiedFlow": "flow",
    "CausalLM": "causal_lm",
    "Classification": "classification",
}

TASKS = {
    "ddpm": "DDPM",
    "rectified_flow": "RectifiedFlow",
    "causal_lm": "CausalLM",
    "classification": "Classification",
}
"""Task names as users write them, and the classes that they stand for."""


def get_task(name: str) -> type[Task]:
    """The task class called `name`; call it with its settings. Raises ValueError with the nearest name for an unknown one.

    >>> get_task("ddpm")(null_label=10).null_label
    10
    >>> get_task("dppm")
    Traceback (most recent call last):
    ValueError: unknown task 'dppm': did you mean 'ddpm'? There are: ddpm, rectified_flow, causal_lm, classification
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {name!r}: {hint}There are: {', '.join(TASKS)}")
    return __getattr__(TASKS[name])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
