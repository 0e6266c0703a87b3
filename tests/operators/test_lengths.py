"""Every token mixer at 1,024 tokens against its definition written out densely, and on batches of nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.attention import Attention, LatentAttention
from graftc.operators.conv import DepthwiseConv
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY
from graftc.operators.linear_attention import LinearAttention, LinearWindowAttention
from graftc.operators.local_2d import LocalAttention2d
from graftc.operators.mamba2 import Mamba2
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS, WIDE, TOKENS, SIDE = 8, 2, 4, 1024, 32


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDE)).transpose(1, 2)


def joined(op: nn.Module, weight: Tensor, v: Tensor) -> Tensor:
    y = (weight / weight.sum(-1, keepdim=True)) @ v
    return op.out_proj(y.transpose(1, 2).flatten(2))


def softmax(op: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    q, k, v = map(heads_of, op.in_proj(x).chunk(3, -1))
    return joined(op, (q @ k.transpose(-1, -2) / WIDE**0.5).exp() * seen, v)


def latent(op: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    k, v = map(heads_of, op.kv_up(op.kv_down(x)).chunk(2, -1))
    q = heads_of(op.q_proj(x))
    return joined(op, (q @ k.transpose(-1, -2) / WIDE**0.5).exp() * seen, v)


def linear(op: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    q, k, v = map(heads_of, op.in_proj(x).chunk(3, -1))
    return joined(op, ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)) * seen, v)


def hybrid(op: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    """Softmax in a token's block and its neighbours, linear attention elsewhere, one normaliser."""
    q, k, v = map(heads_of, op.in_proj(x).chunk(3, -1))
    block = torch.arange(TOKENS) // op.window
    near = (block.unsqueeze(1) - block).abs() <= 1
    scores = (q @ k.transpose(-1, -2) / WIDE**0.5).masked_fill(~(near & seen), -torch.inf)
    share = op.factor.sigmoid().reshape(1, HEADS, 1, 1)
    soft = share * (scores - scores.amax(-1, keepdim=True)).exp()
    far = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)) * (seen & ~near)
    return joined(op, soft + far, v)


AWAY = torch.arange(TOKENS).unsqueeze(1) - torch.arange(TOKENS)
ALL, PAST = AWAY == AWAY, AWAY >= 0
ROW, COLUMN = torch.arange(TOKENS) // SIDE, torch.arange(TOKENS) % SIDE
DISC = (ROW.unsqueeze(1) - ROW) ** 2 + (COLUMN.unsqueeze(1) - COLUMN) ** 2 < 25
DENSE = {
    "attention": (lambda: Attention(DIM, HEADS), softmax, ALL),
    "causal attention": (lambda: Attention(DIM, HEADS, causal=True), softmax, PAST),
    "latent_attention": (lambda: LatentAttention(DIM, HEADS, 3), latent, ALL),
    "sliding_window": (lambda: SlidingWindow(DIM, HEADS, 100), softmax, AWAY.abs() <= 100),
    "causal sliding_window": (lambda: SlidingWindow(DIM, HEADS, 100, causal=True), softmax, PAST & (AWAY <= 100)),
    "local_attention_2d": (lambda: LocalAttention2d(DIM, HEADS, 5, SIDE, SIDE), softmax, DISC),
    "linear_attention": (lambda: LinearAttention(DIM, HEADS), linear, ALL),
    "causal linear_attention": (lambda: LinearAttention(DIM, HEADS, causal=True), linear, PAST),
    "linear_window_attention": (lambda: LinearWindowAttention(DIM, HEADS, 48, feature="elu1"), hybrid, ALL),
    "causal linear_window_attention": (
        lambda: LinearWindowAttention(DIM, HEADS, 48, feature="elu1", causal=True), hybrid, PAST,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_at_1024_tokens(name):
    make, reference, seen = DENSE[name]
    torch.manual_seed(0)
    op, x = make().double(), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(op(x), reference(op, x, seen), rtol=1e-5, atol=1e-7)
        single = op.float()(x.float())
        wanted = reference(op.double(), x, seen).float()
    torch.testing.assert_close(single, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["blocks", "dense"])
@pytest.mark.parametrize("window", [19, 20, 50])
def test_a_window_as_long_as_the_sequence_is_all_of_it(window, form):
    op, x = SlidingWindow(DIM, HEADS, window, form=form), torch.randn(2, 20, DIM)
    torch.testing.assert_close(op(x), softmax(op, x, ALL[:20, :20]))


def shifted(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A causal filter of each channel as a sum over its taps; x: [batch, tokens, channels]."""
    taps = weight.shape[-1]
    y = bias.expand_as(x).clone()
    for i in range(taps):
        back = taps - 1 - i
        y[:, back:] += weight[:, 0, i] * x[:, : x.shape[1] - back]
    return y


def test_a_gated_convolution_at_1024_tokens():
    torch.manual_seed(0)
    op, x = HyenaY(DIM).double(), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    q, k, v = op.in_proj(x).chunk(3, -1)
    filters = dict(op.named_modules())["inner_filter"]
    wanted = op.out_proj(q * shifted(filters.weight, filters.bias, k * v))
    torch.testing.assert_close(op(x), wanted)


BATCHES = {
    **{n: make for n, (make, _, _) in DENSE.items() if "2d" not in n},
    "local_attention_2d": lambda: LocalAttention2d(DIM, HEADS, 2, 1, 5),
    "mamba2": lambda: Mamba2(DIM, 4, 4),
    "mamba2, both ways": lambda: Mamba2(DIM, 4, 4, causal=False),
    "hyena_x": lambda: HyenaX(DIM),
    "hyena_y": lambda: HyenaY(DIM),
    "hyena_se": lambda: HyenaSE(DIM),
    "depthwise_conv": lambda: DepthwiseConv(DIM, 4),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_nothing_gives_nothing(name):
    assert BATCHES[name]()(torch.zeros(0, 5, DIM)).shape == (0, 5, DIM)
