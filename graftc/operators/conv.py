"""Depthwise convolution along the tokens, or over a grid of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def check_form(
    operator: str, kernel: int, causal: bool, dims: int, height: int | None, width: int | None
) -> tuple[int, int] | None:
    """The grid where there is one, None along the tokens. ValueError where they do not fit.

    >>> check_form("hyena_x", 3, False, 2, 4, 6)
    (4, 6)
    """
    if kernel < 1:
        raise ValueError(f"{operator}: kernel is {kernel}, wanted at least 1")
    if dims == 1:
        return None
    if dims != 2:
        raise ValueError(f"{operator}: dims is {dims}, wanted 1 or 2")
    if causal:
        raise ValueError(f"{operator}: with dims = 2 the taps are centred; write causal = false")
    if height is None or width is None or height < 1 or width < 1:
        raise ValueError(f"{operator}: with dims = 2 the grid is needed, found {height} x {width}")
    return height, width


class TokenFilter(nn.Conv1d):
    """One filter a channel, of tokens as they lie in memory: [batch, tokens, channels] in and out, no padding.

    Parameters as of `nn.Conv1d`. Computed over an image of one row, as a convolution whose channels lie side by
    side needs no transposed copy and is faster on a CPU.

    >>> import torch
    >>> TokenFilter(8, 3)(torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        u = input.unsqueeze(1).permute(0, 3, 1, 2)
        y = F.conv2d(u, self.weight.unsqueeze(2), self.bias, groups=self.groups)
        return y.permute(0, 2, 3, 1).flatten(1, 2)


def depthwise(channels: int, kernel: int, dims: int) -> TokenFilter | nn.Conv2d:
    """One filter a channel, of `kernel` taps, or `kernel` by `kernel`."""
    if dims == 2:
        return nn.Conv2d(channels, channels, kernel, groups=channels)
    return TokenFilter(channels, kernel)


def along_tokens(
    x: Tensor,
    filter: TokenFilter | nn.Conv2d,
    causal: bool,
    grid: tuple[int, int] | None,
    form: str = "conv",
    operator: str = "depthwise_conv",
) -> Tensor:
    """One filter a channel along the tokens, or over the grid; x: [batch, tokens, channels].

    Causal: the last tap is the token itself. Else the taps are centred, an even kernel having
    one more on the right (and below). `form`: by `conv`, or as the same sum of `shifts` of x, each
    times its tap, which a compiler fuses with what follows. `operator`: the name that an error gives.
    """
    taps = filter.kernel_size[0]
    left = taps - 1 if causal else (taps - 1) // 2
    right = taps - 1 - left
    if form == "shifts" and grid is None:
        padded = F.pad(x, (0, 0, left, right))
        y = padded[:, : x.shape[1]] * filter.weight[:, 0, 0]
        for tap in range(1, taps):
            y = y + padded[:, tap : tap + x.shape[1]] * filter.weight[:, 0, tap]
        return y if filter.bias is None else y + filter.bias
    if grid is None and x.shape[1] == 0:  # torch's convolution wants an input as long as its taps
        return x
    if grid is not None and x.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{operator}: {x.shape[1]} tokens, built for a grid of {grid[0]} x {grid[1]}"
        )
    if grid is None:
        return filter(F.pad(x, (0, 0, left, right)))
    u = F.pad(x.unflatten(1, grid), (0, 0, left, right, left, right))
    return filter(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)


class DepthwiseConv(nn.Module):
    """y = one filter a channel along the tokens, of x; x and y are [batch, tokens, dim].

    Causal: the last tap is the token itself. Else the taps are centred, an even kernel having
    one more on the right. With `dims = 2` the taps lie on a grid of `height` by `width` tokens.
    `init` says how it starts: as the `identity`, as `zero`, or `random`.

    >>> import torch
    >>> x = torch.randn(1, 5, 8)
    >>> bool(torch.equal(DepthwiseConv(dim=8, kernel=7)(x), x))
    True
    """

    def __init__(
        self,
        dim: int,
        kernel: int,
        causal: bool = False,
        init: str = "identity",
        dims: int = 1,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if init not in ("identity", "zero", "random"):
            raise ValueError(
                f"depthwise_conv: unknown init {init!r}, wanted identity, zero or random"
            )
        self.grid = check_form("depthwise_conv", kernel, causal, dims, height, width)
        self.causal = causal
        self.filter = depthwise(dim, kernel, dims)
        if init != "random":
            for parameter in self.filter.parameters():
                nn.init.zeros_(parameter)
        if init == "identity":
            centre = kernel - 1 if causal else (kernel - 1) // 2
            own = (centre,) if dims == 1 else (centre, centre)
            nn.init.ones_(self.filter.weight[(slice(None), slice(None), *own)])

    def forward(self, x: Tensor) -> Tensor:
        return along_tokens(x, self.filter, self.causal, self.grid)
