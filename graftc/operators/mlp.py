"""The MLP of any width, plain or gated; and the gated convolution along the channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def activate(x: Tensor, name: str) -> Tensor:
    """The activation function `name`."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    if name == "relu_squared":
        return F.relu(x).square()
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "tanh":
        return torch.tanh(x)
    if name == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"mlp: unknown activation {name!r}")


class Mlp(nn.Module):
    """y = fc2(act(fc1(x))), or fc2(act(gate(x)) · fc1(x)) where `gated`; [batch, tokens, dim].

    It has `ratio · dim` neurons, rounded. (Grafting, arXiv 2506.05340, table 3: ratios 3 and 6
    in place of 4; gated: arXiv 2002.05202.)

    >>> Mlp(dim=8, ratio=3)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self, dim: int, ratio: float, activation: str = "gelu", gated: bool = False
    ) -> None:
        super().__init__()
        if ratio <= 0:
            raise ValueError(f"mlp: ratio is {ratio}, wanted more than 0")
        activate(torch.zeros(1), activation)  # an unknown name fails here, not in the first step
        hidden = max(1, round(ratio * dim))
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden) if gated else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.fc2(activate(self.fc1(x), self.activation))
        return self.fc2(activate(self.gate(x), self.activation) * self.fc1(x))


class MlpHyenaX(nn.Module):
    """y = out(q · (k · v)), [q, k, v] = conv(in(x)), the convolution along the channels.

    x and y are [batch, tokens, dim]; q, k and v are `ratio · dim` wide. `short_filter` has one
    causal filter of `kernel` taps for each *token position*, sliding over the 3 · ratio · dim
    features of its token: it mixes no tokens, and takes only the token count that it was built
    for. (Grafting, arXiv 2506.05340, table 3, the released MLP Hyena-X.)

    >>> MlpHyenaX(dim=8, tokens=5)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, tokens: int, ratio: float = 2, kernel: int = 4) -> None:
        super().__init__()
        if ratio <= 0:
            raise ValueError(f"mlp_hyena_x: ratio is {ratio}, wanted more than 0")
        if kernel < 1 or tokens < 1:
            raise ValueError(
                f"mlp_hyena_x: kernel is {kernel}, tokens is {tokens}, wanted at least 1"
            )
        hidden = max(1, round(ratio * dim))
        self.tokens = tokens
        self.in_proj = nn.Linear(dim, 3 * hidden)
        self.short_filter = nn.Conv1d(tokens, tokens, kernel, groups=tokens)
        self.out_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.tokens:
            raise ValueError(f"mlp_hyena_x: {x.shape[1]} tokens, built for {self.tokens}")
        u = F.pad(self.in_proj(x), (self.short_filter.kernel_size[0] - 1, 0))
        q, k, v = self.short_filter(u).chunk(3, dim=-1)
        return self.out_proj(q * (k * v))
