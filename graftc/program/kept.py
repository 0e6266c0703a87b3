"""The user's model stays as it was: what a traced forward leaves in it is put back.

Tracing runs forward on tensors without values. What forward keeps (`self.last = x`, a list that it appends to, a
buffer that it replaces) would stay in the user's model, and be one of those.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

PLAIN = (bool, int, float, str)
_HELD = (list, dict, set)


@dataclass
class Changes:
    """Attributes that were set: those that held numbers or strings, and those that held tensors, as (path, name)."""

    set: dict[tuple[str, str], None] = field(default_factory=dict[tuple[str, str], None])
    tensors: dict[tuple[str, str], None] = field(default_factory=dict[tuple[str, str], None])


@contextmanager
def as_it_was(module: nn.Module) -> Generator[Changes]:
    """Afterwards every attribute of the modules, and every list, dict or set among them, is what it was before.

    >>> layer = nn.Linear(2, 2)
    >>> with as_it_was(layer) as changes:
    ...     layer.calls, layer.seen = 1, [3]
    >>> hasattr(layer, "calls")
    False
    """
    before = [(path, m, dict(vars(m)), _contents(m)) for path, m in module.named_modules()]
    changes = Changes()
    paths = {id(m): path for path, m, _, _ in before}
    every: Any = nn.Module
    write: Any = nn.Module.__setattr__

    def __setattr__(self: nn.Module, name: str, given: Any) -> None:
        held = vars(self).get(name)
        if id(self) in paths and type(held) in PLAIN:
            changes.set[paths[id(self)], name] = None
        elif id(self) in paths and isinstance(held, torch.Tensor):
            changes.tensors[paths[id(self)], name] = None
        write(self, name, given)

    every.__setattr__ = __setattr__
    try:
        yield changes
    finally:
        every.__setattr__ = write
        for _, m, attributes, contents in before:
            _refill(vars(m), attributes)
            for held, copy in contents:
                _refill(held, copy)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(v, v.copy()) for v in vars(module).values() if type(v) in _HELD]


def _refill(held: Any, copy: Any) -> None:
    """Give a list, dict or set its contents again. By identity: tensors have no `==` that says yes or no."""
    old, new = (list(v.items() if isinstance(v, dict) else v) for v in (copy, held))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(copy, dict):
        same = len(old) == len(new) and all(k in held and held[k] is v for k, v in old)
    else:
        same = len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
    if not same:
        held.clear()
        held.extend(copy) if isinstance(held, list) else held.update(copy)


@contextmanager
def buffers_without_values(module: nn.Module, mode: FakeTensorMode) -> Generator[None]:
    """Within, the buffers are fake tensors of `mode`, so that a write in place changes no value of the user's."""
    made: dict[int, torch.Tensor] = {}
    with as_it_was(module):
        for m in module.modules():
            for name, buffer in m._buffers.items():
                if buffer is not None:
                    m._buffers[name] = made.setdefault(id(buffer), mode.from_tensor(buffer))
        yield
