"""The token-wise linear map: the control that mixes no tokens."""

from __future__ import annotations

from torch import Tensor, nn


class TokenLinear(nn.Module):
    """y = proj(x), token by token; x and y are [batch, tokens, dim].

    What a token mixer must beat: fitted by least squares it says how much of a site needs no
    mixing at all.

    >>> import torch
    >>> TokenLinear(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
