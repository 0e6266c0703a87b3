"""The Hyena family of the paper's testbed: gated short convolutions along the tokens."""

from __future__ import annotations

from torch import Tensor, nn

from graftc.operators.conv import TokenFilter, along_tokens, check_form, depthwise
from graftc.operators.heads import one_form


class GatedConv(nn.Module):
    """What the family shares: where the taps of its filters lie, and how they are computed.

    `form`: by `conv`, or as a sum of `shifts` of the tokens, which a compiler fuses with the gates.
    """

    forms: tuple[str, ...] = ("conv", "shifts")

    def __init__(
        self,
        operator: str,
        kernel: int,
        causal: bool,
        order: int,
        dims: int,
        height: int | None,
        width: int | None,
        form: str,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"{operator}: order is {order}, wanted at least 2")
        self.operator = operator
        self.causal = causal
        self.order = order
        self.grid = check_form(operator, kernel, causal, dims, height, width)
        self.form = one_form(operator, form, self.forms)
        if self.form != "conv" and dims == 2:
            raise ValueError(
                f"{operator}: form = {form} is along the tokens; with dims = 2 use conv"
            )

    def filtered(self, x: Tensor, filter: TokenFilter | nn.Conv2d) -> Tensor:
        """One filter a channel; x: [batch, tokens, channels]."""
        return along_tokens(x, filter, self.causal, self.grid, self.form, self.operator)


class HyenaX(GatedConv):
    """y = out(q · (k · v)), [q, k, v] = conv(in(x)); x and y are [batch, tokens, dim].

    `short_filter` is a depthwise convolution of `kernel` taps along the tokens, on all 3 · dim
    channels before the split. No activation, no normalisation. Of `order` n there are n gates:
    q · (g₂ · … (k · v)). With `dims = 2` the taps lie on a grid of `height` by `width` tokens,
    `kernel` by `kernel` and centred. (Grafting, arXiv 2506.05340, table 3; the released code calls
    the convolution the featuriser. Order: Hyena, arXiv 2302.10866.)

    >>> import torch
    >>> HyenaX(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        kernel: int = 4,
        causal: bool = True,
        order: int = 2,
        dims: int = 1,
        height: int | None = None,
        width: int | None = None,
        form: str = "auto",
    ) -> None:
        super().__init__("hyena_x", kernel, causal, order, dims, height, width, form)
        total = (order + 1) * dim
        self.in_proj = nn.Linear(dim, total)
        self.short_filter = depthwise(total, kernel, dims)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = self.filtered(self.in_proj(x), self.short_filter)
        *gates, y = u.chunk(self.order + 1, dim=-1)
        for gate in reversed(gates):
            y = gate * y
        return self.out_proj(y)


class HyenaY(GatedConv):
    """y = out(q · conv(k · v)), [q, k, v] = in(x); x and y are [batch, tokens, dim].

    `inner_filter` is a depthwise convolution of `kernel` taps along the tokens. Of `order` n there
    are n gates, with the same convolution after each but the last: q · conv(g₂ · … conv(k · v)).
    With `dims = 2` the taps lie on a grid of `height` by `width` tokens. (Grafting, arXiv
    2506.05340, table 3.)

    >>> import torch
    >>> HyenaY(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        kernel: int = 4,
        causal: bool = True,
        order: int = 2,
        dims: int = 1,
        height: int | None = None,
        width: int | None = None,
        form: str = "auto",
    ) -> None:
        super().__init__("hyena_y", kernel, causal, order, dims, height, width, form)
        self.in_proj = nn.Linear(dim, (order + 1) * dim)
        self.inner_filter = depthwise(dim, kernel, dims)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, *gates, y = self.in_proj(x).chunk(self.order + 1, dim=-1)
        for gate in reversed(gates):
            y = self.filtered(gate * y, self.inner_filter)
        return self.out_proj(q * y)


class HyenaSE(GatedConv):
    """y = out(q · conv(k · v)), [q, k, v] = conv(in(x)); x and y are [batch, tokens, dim].

    Both convolutions of the family: `short_filter` on all 3 · dim channels before the split, and
    `inner_filter` on k · v; each of `kernel` taps. Of `order` n there are n gates, with the inner
    convolution after each but the last. With `dims = 2` the taps lie on a grid of `height` by
    `width` tokens. (Grafting, arXiv 2506.05340, table 3.)

    >>> import torch
    >>> HyenaSE(dim=8)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        kernel: int = 4,
        causal: bool = True,
        order: int = 2,
        dims: int = 1,
        height: int | None = None,
        width: int | None = None,
        form: str = "auto",
    ) -> None:
        super().__init__("hyena_se", kernel, causal, order, dims, height, width, form)
        total = (order + 1) * dim
        self.in_proj = nn.Linear(dim, total)
        self.short_filter = depthwise(total, kernel, dims)
        self.inner_filter = depthwise(dim, kernel, dims)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = self.filtered(self.in_proj(x), self.short_filter)
        q, *gates, y = u.chunk(self.order + 1, dim=-1)
        for gate in reversed(gates):
            y = self.filtered(gate * y, self.inner_filter)
        return self.out_proj(q * y)
