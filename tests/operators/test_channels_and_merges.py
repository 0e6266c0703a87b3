"""MLP, token-wise linear, and the merges of parallel branches."""

from __future__ import annotations

import math

import pytest
import torch

from graftc.operators.linear import TokenLinear
from graftc.operators.mlp import Mlp
from graftc.operators.parallel import BlockSumMerge, LerpMerge, LinearMerge, SumMerge
from graftc.operators.specs.mlp import ACTIVATIONS
from graftc.operators.structure import Identity, Zero

DIM = 6


def _erf_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": _erf_gelu,
    "gelu_tanh": _tanh_gelu,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: x * x * (x > 0),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(agrees, activation, gated):
    def reference(w, x):
        up = x @ w["fc1.weight"].T + w["fc1.bias"]
        if gated:
            up = FORMULAS[activation](x @ w["gate.weight"].T + w["gate.bias"]) * up
        else:
            up = FORMULAS[activation](up)
        return up @ w["fc2.weight"].T + w["fc2.bias"]

    agrees(Mlp(DIM, 2.5, activation, gated), reference, DIM, lengths=(1, 7))


def test_mlp_has_ratio_times_dim_neurons():
    assert Mlp(DIM, 8 / 3).fc1.out_features == 16


def test_bad_mlp():
    with pytest.raises(ValueError, match="ratio is 0"):
        Mlp(DIM, 0)
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        Mlp(DIM, 4, "swish")


def test_token_linear(agrees):
    agrees(TokenLinear(DIM), lambda w, x: x @ w["proj.weight"].T + w["proj.bias"], DIM)


def test_identity_and_zero():
    x = torch.randn(2, 3, DIM)
    assert torch.equal(Identity()(x), x)
    assert torch.equal(Zero()(x), torch.zeros(2, 3, DIM))


def test_merges():
    x, a, b, c = (torch.randn(2, 3, DIM) for _ in range(4))
    torch.testing.assert_close(SumMerge()(a, b, c), a + b + c)
    torch.testing.assert_close(BlockSumMerge()(x, a, b, c), x + (a - x) + (b - x) + (c - x))
    torch.testing.assert_close(LerpMerge(0.25)(a, b), 0.75 * a + 0.25 * b)
    merge = LinearMerge(DIM, 3)
    w, offset = merge.proj.weight, merge.proj.bias
    wanted = a @ w[:, :DIM].T + b @ w[:, DIM : 2 * DIM].T + c @ w[:, 2 * DIM :].T + offset
    torch.testing.assert_close(merge(a, b, c), wanted)


def test_fourteen_merges_of_dit_are_the_papers_37_million():
    """Depth to width: 675.13 M + 37.18 M = 712.3 M (paper.md, section 6)."""
    with torch.device("meta"):
        each = sum(p.numel() for p in LinearMerge(1152, 2).parameters())
    assert round(14 * each / 1e6, 2) == 37.18


def test_a_linear_merge_of_one():
    with pytest.raises(ValueError, match="1 branches"):
        LinearMerge(DIM, 1)
