"""The Hyena family of the paper's testbed: gated short convolutions along the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def depthwise_conv(x: Tensor, filter: nn.Conv1d, causal: bool) -> Tensor:
    """One filter a channel along the tokens; x: [batch, tokens, channels].

    Causal: the last tap is the token itself. Else the taps are centred, an even kernel having
    one more on the right.
    """
    taps = filter.kernel_size[0]
    left = taps - 1 if causal else (taps - 1) // 2
    return filter(F.pad(x.transpose(1, 2), (left, taps - 1 - left))).transpose(1, 2)


class HyenaX(nn.Module):
    """y = out(q · (k · v)), [q, k, v] = conv(in(x)); x and y are [batch, tokens, dim].

    `short_filter` is a depthwise convolution of `kernel` taps along the tokens, on all 3 · dim
    channels before the split. No activation, no normalisation. (Grafting, arXiv 2506.05340,
    table 3; the released code calls the convolution the featuriser.)

    >>> import torch
    >>> HyenaX(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, kernel: int = 4, causal: bool = True) -> None:
        super().__init__()
        if kernel < 1:
            raise ValueError(f"hyena_x: kernel is {kernel}, wanted at least 1")
        self.causal = causal
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = nn.Conv1d(3 * dim, 3 * dim, kernel, groups=3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = depthwise_conv(self.in_proj(x), self.short_filter, self.causal)
        q, k, v = u.chunk(3, dim=-1)
        return self.out_proj(q * (k * v))


class HyenaY(nn.Module):
    """y = out(q · conv(k · v)), [q, k, v] = in(x); x and y are [batch, tokens, dim].

    `inner_filter` is a depthwise convolution of `kernel` taps along the tokens. (Grafting,
    arXiv 2506.05340, table 3.)

    >>> import torch
    >>> HyenaY(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, kernel: int = 4, causal: bool = True) -> None:
        super().__init__()
        if kernel < 1:
            raise ValueError(f"hyena_y: kernel is {kernel}, wanted at least 1")
        self.causal = causal
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.inner_filter = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(q * depthwise_conv(k * v, self.inner_filter, self.causal))


class HyenaSE(nn.Module):
    """y = out(q · conv(k · v)), [q, k, v] = conv(in(x)); x and y are [batch, tokens, dim].

    Both convolutions of the family: `short_filter` on all 3 · dim channels before the split, and
    `inner_filter` on k · v; each of `kernel` taps. (Grafting, arXiv 2506.05340, table 3.)

    >>> import torch
    >>> HyenaSE(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, kernel: int = 4, causal: bool = True) -> None:
        super().__init__()
        if kernel < 1:
            raise ValueError(f"hyena_se: kernel is {kernel}, wanted at least 1")
        self.causal = causal
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = nn.Conv1d(3 * dim, 3 * dim, kernel, groups=3 * dim)
        self.inner_filter = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = depthwise_conv(self.in_proj(x), self.short_filter, self.causal)
        q, k, v = u.chunk(3, dim=-1)
        return self.out_proj(q * depthwise_conv(k * v, self.inner_filter, self.causal))
