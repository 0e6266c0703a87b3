"""Filling tokens up to whole chunks, and cutting them again.

Where the token count is a number this is a pad and a slice. Where it is a symbol (`torch.export` with a dynamic
length) tokens are taken by index: no shape then depends on a remainder, which would bound the length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def filled(x: Tensor, tokens: int, length: int) -> Tensor:
    """x, [batch, tokens, …], with `length` tokens: what is added is for nobody to see, and finite where x is.

    >>> filled(torch.ones(1, 3, 2), 3, 4).shape
    torch.Size([1, 4, 2])
    """
    if type(tokens) is int:
        if tokens == length:
            return x
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - tokens))
    return x[:, torch.arange(length, device=x.device).clamp(max=tokens - 1)]


def cut(x: Tensor, tokens: int) -> Tensor:
    """The first `tokens` of x, [batch, at least as many, …].

    >>> cut(torch.ones(1, 4, 2), 3).shape
    torch.Size([1, 3, 2])
    """
    if type(tokens) is int:
        return x if x.shape[1] == tokens else x[:, :tokens]
    return x[:, torch.arange(tokens, device=x.device)]
