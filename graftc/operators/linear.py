"""Linear maps of one token: the control that mixes no tokens, and a product of two thin ones."""

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


class LowRank(nn.Module):
    """y = up(down(x)): a linear map of rank `rank`, token by token.

    x is [batch, tokens, in_features], y [batch, tokens, out_features]; `down` has no bias.
    (SVD-LLM, arXiv 2403.07378.)

    >>> import torch
    >>> LowRank(in_features=8, out_features=6, rank=2)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 6])
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"low_rank: rank is {rank}, wanted 1 to {min(in_features, out_features)}"
            )
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))
