"""Depthwise convolution along the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Module):
    """y = one filter a channel along the tokens, of x; x and y are [batch, tokens, dim].

    Causal: the last tap is the token itself. Else the taps are centred, an even kernel having
    one more on the right. `init` says how it starts: as the `identity`, as `zero`, or `random`.

    >>> import torch
    >>> x = torch.randn(1, 5, 8)
    >>> bool(torch.equal(DepthwiseConv(dim=8, kernel=7)(x), x))
    True
    """

    def __init__(self, dim: int, kernel: int, causal: bool = False, init: str = "identity") -> None:
        super().__init__()
        if kernel < 1:
            raise ValueError(f"depthwise_conv: kernel is {kernel}, wanted at least 1")
        if init not in ("identity", "zero", "random"):
            raise ValueError(
                f"depthwise_conv: unknown init {init!r}, wanted identity, zero or random"
            )
        self.left = kernel - 1 if causal else (kernel - 1) // 2
        self.right = kernel - 1 - self.left
        self.filter = nn.Conv1d(dim, dim, kernel, groups=dim)
        if init != "random":
            for parameter in self.filter.parameters():
                nn.init.zeros_(parameter)
        if init == "identity":
            nn.init.ones_(self.filter.weight[:, :, self.left])

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(F.pad(x.transpose(1, 2), (self.left, self.right))).transpose(1, 2)
