"""Which attributes a module's forward reads, and whether two modules agree in them."""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_STORES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_ALL = "*"
_MISSING: Any = object()


@dataclass
class Record:
    """Attributes that were read, as (path from the block, name), and whether any was written."""

    read: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    written: bool = False


@contextmanager
def recorded(block: nn.Module) -> Generator[Record]:
    """Within, reads and writes of attributes of `block` and of the modules in it are recorded.

    >>> class Scale(nn.Module):
    ...     def __init__(self, by):
    ...         super().__init__()
    ...         self.by, self.number = by, 3
    ...     def forward(self, x):
    ...         return x * self.by
    >>> with recorded(Scale(2)) as record:
    ...     pass
    >>> a, b, c = Scale(2), Scale(2), Scale(5)
    >>> with recorded(a) as record:
    ...     _ = a(torch.ones(1))
    >>> b.number = 4
    >>> same(a, b, record.read), same(a, c, record.read)
    (True, False)
    """
    record = Record()
    paths = {id(m): path for path, m in block.named_modules()}
    lengths = _lengths(block.modules())
    write: Any = nn.Module.__setattr__

    # On nn.Module and not on the blocks: a class of their own would change what `type(self)` is.
    def __getattribute__(self: nn.Module, name: str) -> Any:
        path = paths.get(id(self))
        if path is not None:
            if name == "__dict__":
                # torch's own look-ups go through it; anybody else sees everything.
                if not sys._getframe(1).f_code.co_filename.endswith("modules/module.py"):
                    record.read.add((path, _ALL))
            elif name not in _STORES:
                record.read.add((path, name))
        return super(nn.Module, self).__getattribute__(name)

    def __setattr__(self: nn.Module, name: str, given: Any) -> None:
        record.written = record.written or id(self) in paths
        write(self, name, given)

    every: Any = nn.Module
    every.__getattribute__, every.__setattr__ = __getattribute__, __setattr__
    try:
        yield record
    finally:
        del every.__getattribute__
        every.__setattr__ = write
    record.written = record.written or lengths != _lengths(block.modules())


def _lengths(modules: Iterable[nn.Module]) -> list[int]:
    """Sizes of the lists and dicts that modules hold: what forward appends to is state."""
    return [
        len(held)
        for m in modules
        for n, held in vars(m).items()
        if isinstance(held, (list, dict, set)) and n not in _STORES
    ]


def same(ours: nn.Module, theirs: nn.Module, read: Iterable[tuple[str, str]]) -> bool:
    """Whether two modules of one structure agree in the attributes that were read."""
    pairs = dict(zip(map(id, ours.modules()), map(id, theirs.modules()), strict=True))
    for path, name in read:
        a, b = vars(ours.get_submodule(path)), vars(theirs.get_submodule(path))
        names = ({*a, *b} if name == _ALL else {name}) - _STORES - {"forward"}
        if not all(_equal(a.get(n, _MISSING), b.get(n, _MISSING), pairs, {}) for n in names):
            return False
    return True


_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum,
           range, slice, frozenset)  # fmt: skip


def _equal(a: Any, b: Any, pairs: Mapping[int, int], seen: dict[int, int]) -> bool:
    """Whether code could not tell a from b; in doubt it could."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, nn.Module):
        return pairs.get(id(a)) == id(b)
    if isinstance(a, _VALUES):
        return bool(a == b)
    if id(a) in seen:
        return seen[id(a)] == id(b)
    seen[id(a)] = id(b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(
            _equal(x, y, pairs, seen) for x, y in zip(a, b, strict=True)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(v, b[k], pairs, seen) for k, v in a.items())
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _equal(a.__self__, b.__self__, pairs, seen)
    if isinstance(a, functools.partial):
        return _equal((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), pairs, seen)
    if type(a).__flags__ & (1 << 9) and hasattr(a, "__dict__") and _is_ordinary(type(a)):
        return _equal(vars(a), vars(b), pairs, seen)
    return False


def _is_ordinary(cls: type) -> bool:
    """Whether all that an object holds is in its `__dict__`."""
    return not any("__slots__" in vars(c) and c.__dict__["__slots__"] for c in cls.__mro__) and all(
        c is object or c.__flags__ & (1 << 9) for c in cls.__mro__
    )
