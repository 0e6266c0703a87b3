"""The rate of an attention's dropout, which is an argument and no module."""

from __future__ import annotations

from torch import nn

KEPT = "graft_kept_dropout"
"""Attribute of a loaded package's modules: a dropout of the original, which stage 1 trains without."""


class DropoutRate(nn.Module):
    """p in train mode, 0 in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self) -> float:
        return self.p if self.training else 0.0
