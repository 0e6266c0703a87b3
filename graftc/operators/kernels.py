"""Operators through kernels of other packages, on a GPU: the forms `mamba_ssm`, `causal_conv1d` and `fla`.

Each computes what the operator's own form does, which runs wherever there is no GPU, and in an export. The packages
are imported at the first call on a GPU; a student of such a form runs without them on a CPU. No form of this file is
chosen unasked before it was compared with the operator's own on the GPU at hand (`graftc.operators.agreement`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graftc.operators.conv import TokenFilter
from graftc.operators.hyena import GatedConv, HyenaSE, HyenaX, HyenaY
from graftc.operators.linear_attention import LinearAttention
from graftc.operators.mamba2 import Mamba2


def on_gpu(x: Tensor) -> bool:
    """Whether a call is one for the kernels.

    >>> on_gpu(torch.zeros(1))
    False
    """
    return x.device.type == "cuda" and not torch.compiler.is_exporting()


def not_installed(operator: str, package: str, error: ImportError) -> NoReturn:
    """ImportError that says which package a form needs, and how to do without it."""
    raise ImportError(
        f"{operator}: this form runs through the package `{package}` on a GPU, which is not installed here ({error}); "
        f"install it (pip install {package}), or compile the student with another `form`"
    ) from error


def ssd_kernel() -> Callable[..., Any]:
    """`mamba_chunk_scan_combined` of mamba-ssm."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import (  # type: ignore[import-not-found]
            mamba_chunk_scan_combined,
        )
    except ImportError as error:
        not_installed("mamba2", "mamba-ssm", error)
    return mamba_chunk_scan_combined  # type: ignore[no-any-return]


def conv_kernel() -> Callable[..., Any]:
    """`causal_conv1d_fn` of causal-conv1d."""
    try:
        from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]
    except ImportError as error:
        not_installed("hyena", "causal-conv1d", error)
    return causal_conv1d_fn  # type: ignore[no-any-return]


def linear_kernel() -> Callable[..., Any]:
    """`chunk_linear_attn` of flash-linear-attention."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]
    except ImportError as error:
        not_installed("linear_attention", "flash-linear-attention", error)
    return chunk_linear_attn  # type: ignore[no-any-return]


class KernelMamba2(Mamba2):
    """`Mamba2`, its scan by mamba-ssm's kernel on a GPU.

    >>> KernelMamba2(dim=8, state=4, head_dim=4)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    forms = ("mamba_ssm",)
    needs = "mamba-ssm"

    def recur(self, mixed: Tensor, dt: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor) -> Tensor:
        if not mixed.numel() or not on_gpu(mixed):
            return super().recur(mixed, dt, dt_bias, a_log, d)
        size = self.groups * self.state
        x, b, c = mixed.split([self.inner, size, size], dim=-1)
        y = ssd_kernel()(
            x.unflatten(-1, (self.heads, self.head_dim)),
            dt,
            -a_log.to(torch.promote_types(a_log.dtype, torch.float32)).exp(),
            b.unflatten(-1, (self.groups, self.state)),
            c.unflatten(-1, (self.groups, self.state)),
            chunk_size=self.chunk,
            D=d,
            dt_bias=dt_bias,
            dt_softplus=True,
        )
        return y.flatten(2)


class KernelLinearAttention(LinearAttention):
    """`LinearAttention`, its causal sum by flash-linear-attention's kernel on a GPU.

    >>> KernelLinearAttention(dim=8, heads=2, causal=True)(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    forms = ("fla",)
    needs = "flash-linear-attention"

    def running(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.numel() or not on_gpu(q):
            return super().running(q, k, v)
        given = (t.contiguous() for t in (q, k, v[..., :-1]))
        y: Tensor = linear_kernel()(*given, scale=1.0, normalize=False)[0]
        whole = (q * k.cumsum(dim=1)).sum(dim=-1, keepdim=True)  # of the column of ones
        return torch.cat((y, whole), dim=-1)


class KernelConv(GatedConv):
    """`GatedConv`, its filters by causal-conv1d's kernel on a GPU: causal, along the tokens, of 2 to 4 taps."""

    forms = ("causal_conv1d",)
    needs = "causal-conv1d"

    def filtered(self, x: Tensor, filter: TokenFilter | nn.Conv2d) -> Tensor:
        if not x.numel() or not on_gpu(x):
            return super().filtered(x, filter)
        y = conv_kernel()(x.transpose(1, 2), filter.weight.squeeze(1), filter.bias, activation=None)
        return y.transpose(1, 2)


class KernelHyenaX(KernelConv, HyenaX):
    """`HyenaX` with the filter of `KernelConv`."""


class KernelHyenaY(KernelConv, HyenaY):
    """`HyenaY` with the filter of `KernelConv`."""


class KernelHyenaSE(KernelConv, HyenaSE):
    """`HyenaSE` with the filters of `KernelConv`."""
