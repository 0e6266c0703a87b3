"""Activation checkpointing: a block's inner values are computed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graftc.diagnostics import fail


def blocks_of(module: nn.Module) -> list[str]:
    """Paths of the blocks: members of the outermost `nn.ModuleList`s that hold at least two.

    >>> blocks_of(nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])}))
    ['a.0', 'a.1']
    """
    return list(_blocks(module, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from (f"{full}.{i}" for i in range(len(child)))
        else:
            yield from _blocks(child, full)


@contextmanager
def recomputed(module: nn.Module, others: Sequence[nn.Module] = ()) -> Generator[None]:
    """Every block of `module`, and of `others` that hold blocks at the same paths, checkpointed.

    Raises GraftError (G554) where the model has no list of blocks. Random numbers (dropout) are drawn
    as they were, so gradients are those of a run without it.
    """
    paths = blocks_of(module)
    if not paths:
        fail("G554", "there is no list of blocks to checkpoint", site=type(module).__name__,
             wanted="an nn.ModuleList of at least two", help="leave out `checkpointing`")  # fmt: skip
    wrapped: list[nn.Module] = []
    try:
        for owner in (module, *others):
            found = dict(owner.named_modules())
            for block in (found[path] for path in paths if path in found):
                if "forward" not in vars(block):
                    _wrap(block)
                    wrapped.append(block)
        yield
    finally:
        for block in wrapped:
            del block.forward


def _wrap(block: nn.Module) -> None:
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    block.forward = forward
