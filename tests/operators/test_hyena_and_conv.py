"""The Hyena family and the depthwise convolution against loops over taps and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftc.operators.conv import DepthwiseConv
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY

DIM = 6


def _conv(x: Tensor, weight: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """Tap by tap: y_i = bias + Σ_t w_t · x_{i + t − centre}."""
    taps = weight.shape[-1]
    centre = taps - 1 if causal else (taps - 1) // 2
    rows = []
    for i in range(x.shape[1]):
        row = bias.expand(x.shape[0], -1)
        for t in range(taps):
            if 0 <= i + t - centre < x.shape[1]:
                row = row + weight[:, 0, t] * x[:, i + t - centre]
        rows.append(row)
    return torch.stack(rows, 1)


def _reference(weights, x, causal):
    u = x @ weights["in_proj.weight"].T + weights["in_proj.bias"]
    if "short_filter.weight" in weights:
        u = _conv(u, weights["short_filter.weight"], weights["short_filter.bias"], causal)
    q, k, v = u[..., :DIM], u[..., DIM : 2 * DIM], u[..., 2 * DIM :]
    inner = k * v
    if "inner_filter.weight" in weights:
        inner = _conv(inner, weights["inner_filter.weight"], weights["inner_filter.bias"], causal)
    return (q * inner) @ weights["out_proj.weight"].T + weights["out_proj.bias"]


@pytest.mark.parametrize("cls", [HyenaX, HyenaY, HyenaSE])
@pytest.mark.parametrize(("kernel", "causal"), [(4, True), (5, False), (2, False), (1, True)])
def test_hyena(agrees, cls, kernel, causal):
    agrees(cls(DIM, kernel, causal), lambda w, x: _reference(w, x, causal), DIM)


@pytest.mark.parametrize(("kernel", "causal"), [(4, True), (7, False), (4, False), (1, False)])
def test_depthwise_conv(agrees, kernel, causal):
    module = DepthwiseConv(DIM, kernel, causal, init="random")
    agrees(
        module,
        lambda w, x: _conv(x, w["filter.weight"], w["filter.bias"], causal),
        DIM,
    )


@pytest.mark.parametrize("cls", [HyenaX, HyenaY, HyenaSE])
def test_causal_sees_no_later_token(cls):
    module = cls(DIM)
    x = torch.randn(1, 9, DIM)
    changed = x.clone()
    changed[:, 5:] += 1
    assert torch.equal(module(x)[:, :5], module(changed)[:, :5])
    assert not torch.equal(module(x)[:, 5:], module(changed)[:, 5:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [1, 4, 7])
def test_depthwise_conv_starts_as_it_is_told(kernel, causal):
    x = torch.randn(2, 9, DIM)
    assert torch.equal(DepthwiseConv(DIM, kernel, causal)(x), x)
    assert torch.equal(DepthwiseConv(DIM, kernel, causal, init="zero")(x), torch.zeros_like(x))


@pytest.mark.parametrize("cls", [HyenaX, HyenaY, HyenaSE, DepthwiseConv])
def test_kernel_zero(cls):
    with pytest.raises(ValueError, match="kernel is 0"):
        cls(DIM, kernel=0)


def test_unknown_init():
    with pytest.raises(ValueError, match="unknown init 'ones'"):
        DepthwiseConv(DIM, 3, init="ones")
