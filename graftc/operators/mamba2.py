"""Mamba-2: a state space with a scalar decay a head (SSD), in chunks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.chunks import cut, filled
from graftc.operators.conv import TokenFilter, along_tokens
from graftc.operators.heads import one_form


def ssd_scan(x: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_i = c_i · h_i, h_i = exp(decay_i) h_{i − 1} + b_i x_iᵀ: the definition, token by token.

    x: [batch, tokens, heads, width]; decay: [batch, tokens, heads]; b, c: [batch, tokens, groups,
    state], a group serving heads / groups heads. The reference of `ssd`, and slow.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> ssd_scan(one, torch.zeros(1, 3, 1), one, one).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    each = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(each, dim=2), c.repeat_interleave(each, dim=2)
    state = torch.zeros_like(b[:, 0]).unsqueeze(-1) * x[:, 0].unsqueeze(-2)
    rows: list[Tensor] = []
    for i in range(x.shape[1]):
        added = b[:, i].unsqueeze(-1) * x[:, i].unsqueeze(-2)
        state = decay[:, i].exp()[..., None, None] * state + added
        rows.append((c[:, i].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(rows, dim=1)


def ssd(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """What `ssd_scan` gives, as products in chunks: linear in the tokens (arXiv 2405.21060).

    Inside a chunk y = (c bᵀ · exp(decay from j to i)) x for j ≤ i; the states at the chunks' ends
    are carried on by one product over chunks.
    """
    batch, tokens, heads, width = x.shape
    if tokens == 0:
        return x
    groups, size = b.shape[2], b.shape[3]
    each = heads // groups
    # Two chunks at least, as torch.export takes a size of 1 for fixed.
    chunks: int = torch.sym_max(2, (tokens + chunk - 1) // chunk)  # type: ignore[assignment]
    x, decay, b, c = (filled(t, tokens, chunks * chunk) for t in (x, decay, b, c))
    x = x.reshape(batch, chunks, chunk, groups, each, width)
    b = b.reshape(batch, chunks, chunk, groups, size).transpose(2, 3)
    c = c.reshape(batch, chunks, chunk, groups, size).transpose(2, 3)
    decay = decay.reshape(batch, chunks, chunk, groups, each).permute(0, 1, 3, 4, 2)
    total = decay.cumsum(dim=-1)  # [batch, chunks, groups, heads of a group, chunk]
    step = torch.arange(chunk, device=x.device)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    between = between.masked_fill(step > step.unsqueeze(1), -math.inf).exp()
    inside = ((c @ b.transpose(-1, -2)).unsqueeze(3) * between) @ x.permute(0, 1, 3, 4, 2, 5)

    # b and c are those of all heads of a group: one product a group, the heads side by side.
    to_end = (total[..., -1:] - total).exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)
    state = b.transpose(-1, -2) @ (x * to_end).flatten(4).transpose(2, 3)
    state = state.unflatten(-1, (each, width)).permute(0, 2, 4, 1, 3, 5)
    ends = total[..., -1].movedim(1, -1).reshape(batch * heads, chunks).cumsum(dim=-1)
    # One row for each chunk that carries in: as a table of three dimensions, the strides of which
    # torch.export compares, it would bound the length.
    row = torch.arange(batch * heads * chunks, device=x.device)
    sequence = row // chunks
    later = torch.arange(chunks, device=x.device) >= (row - sequence * chunks).unsqueeze(1)
    carried = F.pad(ends, (1, -1)).reshape(-1, 1) - ends[sequence]
    carried = carried.masked_fill(later, -math.inf).exp().reshape(batch * heads, chunks, chunks)
    state = carried.bmm(state.reshape(batch * heads, chunks, size * width))
    state = state.reshape(batch, groups, each, chunks, size, width).permute(0, 3, 1, 4, 2, 5)
    before = (c @ state.flatten(4)).unflatten(-1, (each, width)).transpose(2, 3)
    y = before * total.exp().permute(0, 1, 4, 2, 3).unsqueeze(-1) + inside.permute(0, 1, 4, 2, 3, 5)
    return cut(y.reshape(batch, chunks * chunk, heads, width), tokens)


class GatedRMSNorm(nn.Module):
    """y = weight · rms_norm(x · silu(z)), over each of `groups` parts of the features.

    x, z: [batch, tokens, dim]. As mamba_ssm's RMSNormGated with norm_before_gate = False.

    >>> GatedRMSNorm(4, 1)(torch.ones(1, 1, 4), torch.ones(1, 1, 4)).round().sum().item()
    4.0
    """

    def __init__(self, dim: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (x.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        y = y * (y.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return (y.flatten(-2) * self.weight).to(x.dtype)


class Mamba2(nn.Module):
    """A selective state space; x and y are [batch, tokens, dim].

    [z, x, B, C, dt] = in_proj(x); [x, B, C] = silu(conv(x, B, C)), depthwise and causal;
    dt = softplus(dt + dt_bias); h_i = exp(−exp(A_log) dt_i) h_{i − 1} + dt_i B_i x_iᵀ;
    y_i = C_i · h_i + D x_i; the result is out_proj(norm(y · silu(z))). There are
    `expand · dim / head_dim` heads, and `groups` of them share B and C. (Mamba-2,
    arXiv 2405.21060; names, layouts and counts of parameters are those of mamba_ssm.Mamba2.)

    `causal = false` adds a second scan from the end, with `conv1d_back`, `dt_bias_back`,
    `A_log_back`, `D_back` of its own: both read one in_proj, and their y are added.
    The decay is computed in float32 at least.

    >>> Mamba2(dim=8, state=4, head_dim=4)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    forms: tuple[str, ...] = ("chunks",)

    def __init__(
        self,
        dim: int,
        state: int = 64,
        head_dim: int = 64,
        groups: int = 1,
        expand: float = 2,
        kernel: int = 4,
        causal: bool = True,
        form: str = "auto",
    ) -> None:
        super().__init__()
        self.form = one_form("mamba2", form, self.forms)
        inner = round(expand * dim)
        if state < 1 or kernel < 1:
            raise ValueError(f"mamba2: state is {state}, kernel is {kernel}, wanted at least 1")
        if head_dim < 1 or inner % head_dim:
            raise ValueError(f"mamba2: width {inner} is not divisible by head_dim {head_dim}")
        self.inner = inner
        self.state = state
        self.head_dim = head_dim
        self.groups = groups
        self.heads = inner // head_dim
        self.causal = causal
        if groups < 1 or self.heads % groups:
            raise ValueError(f"mamba2: heads {self.heads} is not a multiple of groups {groups}")
        self.chunk = 64
        mixed = inner + 2 * groups * state
        self.in_proj = nn.Linear(dim, inner + mixed + self.heads, bias=False)
        self.conv1d = TokenFilter(mixed, kernel)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        if not causal:
            self.conv1d_back = TokenFilter(mixed, kernel)
            self.dt_bias_back = nn.Parameter(torch.empty(self.heads))
            self.A_log_back = nn.Parameter(torch.empty(self.heads))
            self.D_back = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(inner, groups)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        for name, parameter in self.named_parameters(recurse=False):
            self._first(name, parameter)

    def _first(self, name: str, parameter: nn.Parameter) -> None:
        """dt between 0.001 and 0.1, log-uniform; A between 1 and 16; D one: as mamba_ssm."""
        with torch.no_grad():
            if name.startswith("dt_bias"):
                dt = torch.rand_like(parameter) * math.log(100) + math.log(0.001)
                dt = dt.exp().clamp(min=1e-4)
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt again
            elif name.startswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log())
            else:
                parameter.fill_(1.0)

    def scan(
        self,
        mixed: Tensor,
        dt: Tensor,
        filter: TokenFilter,
        dt_bias: Tensor,
        a_log: Tensor,
        d: Tensor,
    ) -> Tensor:
        """One direction: [x, B, C] before the convolution, and dt, to y."""
        mixed = F.silu(along_tokens(mixed, filter, causal=True, grid=None))
        return self.recur(mixed, dt, dt_bias, a_log, d)

    def recur(self, mixed: Tensor, dt: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor) -> Tensor:
        """[x, B, C] after the convolution, and dt, to y."""
        batch, tokens, _ = mixed.shape
        wide = torch.promote_types(mixed.dtype, torch.float32)
        size = self.groups * self.state
        x, b, c = mixed.to(wide).split([self.inner, size, size], dim=-1)
        x = x.reshape(batch, tokens, self.heads, self.head_dim)
        b = b.reshape(batch, tokens, self.groups, self.state)
        c = c.reshape(batch, tokens, self.groups, self.state)
        dt = F.softplus(dt.to(wide) + dt_bias.to(wide))
        decay = -a_log.to(wide).exp() * dt
        y = ssd(x * dt.unsqueeze(-1), decay, b, c, self.chunk) + x * d.to(wide).unsqueeze(-1)
        return y.reshape(batch, tokens, self.inner)

    def forward(self, x: Tensor) -> Tensor:
        mixed_width = self.inner + 2 * self.groups * self.state
        z, mixed, dt = self.in_proj(x).split([self.inner, mixed_width, self.heads], dim=-1)
        y = self.scan(mixed, dt, self.conv1d, self.dt_bias, self.A_log, self.D)
        if not self.causal:
            back = self.scan(
                mixed.flip(1),
                dt.flip(1),
                self.conv1d_back,
                self.dt_bias_back,
                self.A_log_back,
                self.D_back,
            )
            y = y + back.flip(1)
        return self.out_proj(self.norm(y, z).to(x.dtype))
