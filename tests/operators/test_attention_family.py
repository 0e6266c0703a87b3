"""Softmax, sliding-window and linear attention against loops over the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftc.operators.attention import Attention
from graftc.operators.linear_attention import LinearAttention
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS, HEAD_DIM = 12, 4, 3


def _projected(weights: dict[str, Tensor], x: Tensor, kv_heads: int) -> list[list[Tensor]]:
    """q, k, v of each query head, [batch, tokens, head_dim], sliced row by row."""
    u = x @ weights["in_proj.weight"].T + weights["in_proj.bias"]
    q_rows, kv_rows = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    heads: list[list[Tensor]] = []
    for head in range(HEADS):
        kv = head * kv_heads // HEADS
        starts = (head * HEAD_DIM, q_rows + kv * HEAD_DIM, q_rows + kv_rows + kv * HEAD_DIM)
        heads.append([u[..., s : s + HEAD_DIM] for s in starts])
    return heads


def _out(weights: dict[str, Tensor], heads: list[Tensor]) -> Tensor:
    return torch.cat(heads, -1) @ weights["out_proj.weight"].T + weights["out_proj.bias"]


def _softmax_reference(weights, x, kv_heads, sees):
    """Dense attention with the mask sees(i, j)."""
    tokens = x.shape[1]
    seen = torch.tensor([[sees(i, j) for j in range(tokens)] for i in range(tokens)])
    outputs = []
    for q, k, v in _projected(weights, x, kv_heads):
        scores = torch.einsum("bid,bjd->bij", q, k) / HEAD_DIM**0.5
        weight = scores.exp() * seen
        outputs.append(torch.einsum("bij,bjd->bid", weight / weight.sum(-1, keepdim=True), v))
    return _out(weights, outputs)


def _linear_reference(weights, x, kv_heads, feature, causal):
    """The sums of the definition, token by token."""
    phi = {"elu1": lambda t: F.elu(t) + 1, "relu": F.relu}[feature]
    outputs = []
    for q, k, v in _projected(weights, x, kv_heads):
        rows = []
        for i in range(x.shape[1]):
            last = i + 1 if causal else x.shape[1]
            weight = (phi(q[:, i : i + 1]) * phi(k[:, :last])).sum(-1, keepdim=True)
            rows.append((weight * v[:, :last]).sum(1) / (weight.sum(1) + 1e-6))
        outputs.append(torch.stack(rows, 1))
    return _out(weights, outputs)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(agrees, kv_heads, causal):
    module = Attention(DIM, HEADS, kv_heads, causal=causal)
    agrees(
        module,
        lambda w, x: _softmax_reference(w, x, kv_heads, lambda i, j: j <= i or not causal),
        DIM,
    )


@pytest.mark.parametrize(
    ("window", "kv_heads", "causal"),
    [(4, 4, False), (4, 2, True), (1, 1, False), (20, 4, False), (33, 4, True), (101, 4, False)],
)
def test_sliding_window(agrees, window, kv_heads, causal):
    module = SlidingWindow(DIM, HEADS, window, kv_heads, causal=causal)

    def sees(i: int, j: int) -> bool:
        return 0 <= i - j <= window if causal else abs(i - j) <= window

    agrees(module, lambda w, x: _softmax_reference(w, x, kv_heads, sees), DIM)


@pytest.mark.parametrize("feature", ["elu1", "relu"])
@pytest.mark.parametrize(("causal", "kv_heads"), [(False, 2), (True, 4)])
def test_linear_attention(agrees, feature, causal, kv_heads):
    module = LinearAttention(DIM, HEADS, kv_heads, feature=feature, causal=causal)
    agrees(
        module,
        lambda w, x: _linear_reference(w, x, kv_heads, feature, causal),
        DIM,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_1024_tokens(causal):
    """Many blocks: against dense attention under a band mask."""
    torch.manual_seed(0)
    module = SlidingWindow(DIM, HEADS, window=5, causal=causal).double()
    dense = Attention(DIM, HEADS).double()
    dense.load_state_dict(module.state_dict())
    x = torch.randn(1, 1024, DIM, dtype=torch.float64)
    far = torch.arange(1024).unsqueeze(1) - torch.arange(1024)
    seen = (far <= 5) & (far >= (0 if causal else -5))
    q, k, v = (t.reshape(1, 1024, HEADS, -1).transpose(1, 2) for t in dense.in_proj(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), dense.out_proj(y), rtol=1e-10, atol=1e-12)


def test_a_wider_head_than_dim_over_heads():
    assert Attention(8, 2, head_dim=16)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
    assert SlidingWindow(8, 2, 1, head_dim=16)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
    assert LinearAttention(8, 2, head_dim=16)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)


def test_half_precision_does_not_overflow_over_many_tokens():
    """The plain sums pass 65504 at some thousand tokens; the normaliser must not be infinite."""
    module = LinearAttention(8, 1, feature="elu1").half()
    x = 8 * torch.ones(1, 4096, 8, dtype=torch.float16)
    with torch.no_grad():
        module.in_proj.weight.fill_(0.2)
        assert torch.isfinite(module(x)).all()


def test_relu_that_sees_nothing_gives_the_bias():
    module = LinearAttention(8, 2, feature="relu")
    with torch.no_grad():
        module.in_proj.weight.zero_()
        module.in_proj.bias.fill_(-1)
        y = module(torch.randn(1, 5, 8))
    torch.testing.assert_close(y, module.out_proj.bias.expand(1, 5, 8))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Attention(10, 4), "dim 10 is not divisible by heads 4"),
        (lambda: Attention(8, 4, 3), "heads 4 is not a multiple of kv_heads 3"),
        (lambda: SlidingWindow(8, 4, 0), "window is 0"),
        (lambda: SlidingWindow(10, 4, 1), "dim 10 is not divisible by heads 4"),
        (lambda: LinearAttention(8, 4, feature="cosine"), "unknown feature 'cosine'"),
        (lambda: LinearAttention(8, 0), "heads 0"),
    ],
)
def test_bad_sizes(make, says):
    with pytest.raises(ValueError, match=says):
        make()
