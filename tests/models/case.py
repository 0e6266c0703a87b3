"""A model of the matrix: how it is built, and what `inspect` must find in it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from graftc.program.model import Model


@dataclass(frozen=True)
class Case:
    """`build` returns the model, seeded; the counts are how many sites of a role there are.

    `chains`: the length of each chain of blocks, in order. `gated`: how many of the MLPs are. `has`: what some
    attention of it has ('mask', 'rotary', 'causal', 'groups', 'qk_norm').
    `length`: an input's name and dimension that another length may stand in.
    """

    name: str
    make: Callable[[], Model]
    chains: tuple[int, ...] = ()
    self_attention: int = 0
    cross_attention: int = 0
    joint_attention: int = 0
    mlp: int = 0
    gated: int = 0
    has: Set[str] = field(default_factory=frozenset)

    def build(self) -> Model:
        torch.manual_seed(0)
        return self.make()


def unlike(module: nn.Module) -> nn.Module:
    """In eval mode, with parameters that are all unlike zero and one: a gate of zero hides what is behind it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise.to(parameter.dtype))
    return module.eval()
