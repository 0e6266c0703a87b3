"""Norms of q and k, the factor of the scores, and joint attention, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graftc.operators.attention import Attention, CrossAttention, LatentAttention
from graftc.operators.heads import rotate
from graftc.operators.joint import JointAttention
from graftc.operators.linear_attention import LinearAttention, LinearWindowAttention
from graftc.operators.local_2d import LocalAttention2d
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS, HEAD_DIM, TOKENS = 12, 4, 4, 9
EPS, SCALE = 1e-2, 0.3  # an eps that counts


def drawn(module: nn.Module) -> nn.Module:
    """In float64, every parameter unlike zero and one."""
    generator = torch.Generator().manual_seed(0)
    for p in module.double().parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1] ** 0.5
    return module


def normed(x: Tensor, norm: nn.Module, kind: str, over: str, heads: int = HEADS) -> Tensor:
    """x: [batch, tokens, heads · head_dim], normalised and then cut into [batch, heads, tokens, head_dim]."""
    if over == "head":
        x = x.unflatten(-1, (heads, HEAD_DIM))
    centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
    x = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight
    x = x + norm.bias if kind == "layer_norm" else x
    return x.reshape(*x.shape[:2], heads, HEAD_DIM).transpose(1, 2)


def heads_of(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | bool = True) -> Tensor:
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    scores = (SCALE * q @ k.transpose(-1, -2)).masked_fill(~torch.as_tensor(seen), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def x_of(tokens: int = TOKENS) -> Tensor:
    return torch.randn(
        2, tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


KINDS = [
    ("rms_norm", "head"),
    ("rms_norm", "width"),
    ("layer_norm", "head"),
    ("layer_norm", "width"),
]
AWAY = (torch.arange(TOKENS).unsqueeze(1) - torch.arange(TOKENS)).abs()
ROW, COLUMN = torch.arange(TOKENS) // 3, torch.arange(TOKENS) % 3
DISC = (ROW.unsqueeze(1) - ROW) ** 2 + (COLUMN.unsqueeze(1) - COLUMN) ** 2 < 4
SELF = {
    "attention": (lambda **k: Attention(DIM, HEADS, 2, HEAD_DIM, **k), True),
    "sliding_window": (lambda **k: SlidingWindow(DIM, HEADS, 2, 2, HEAD_DIM, **k), AWAY <= 2),
    "dense window": (lambda **k: SlidingWindow(DIM, HEADS, 2, 2, HEAD_DIM, form="dense", **k), AWAY <= 2),
    "local_attention_2d": (lambda **k: LocalAttention2d(DIM, HEADS, 2, 3, 3, 2, HEAD_DIM, **k), DISC),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "over"), KINDS)
@pytest.mark.parametrize("name", SELF)
def test_norms_and_scale_of_self_attention(name, kind, over):
    make, seen = SELF[name]
    op = drawn(make(qk_norm=kind, norm_over=over, norm_eps=EPS, scale=SCALE))
    x = x_of()
    q, k, v = op.in_proj(x).split([16, 8, 8], -1)
    q, k = normed(q, op.q_norm, kind, over), normed(k, op.k_norm, kind, over, 2)
    torch.testing.assert_close(op(x), op.out_proj(dense(q, k, heads_of(v, 2), seen)))


@pytest.mark.parametrize(("kind", "over"), KINDS)
def test_norms_and_scale_of_the_others(kind, over):
    given = {"qk_norm": kind, "norm_over": over, "norm_eps": EPS}
    x, context = x_of(), x_of(5)[..., :10]
    op = drawn(CrossAttention(DIM, 10, HEADS, 2, HEAD_DIM, scale=SCALE, out=False, **given))
    k, v = op.kv_proj(context).chunk(2, -1)
    q, k = normed(op.q_proj(x), op.q_norm, kind, over), normed(k, op.k_norm, kind, over, 2)
    torch.testing.assert_close(op(x, context), dense(q, k, heads_of(v, 2)))

    op = drawn(LatentAttention(DIM, HEADS, 3, HEAD_DIM, scale=SCALE, **given))
    k, v = op.kv_up(op.kv_down(x)).chunk(2, -1)
    q, k = normed(op.q_proj(x), op.q_norm, kind, over), normed(k, op.k_norm, kind, over)
    torch.testing.assert_close(op(x), op.out_proj(dense(q, k, heads_of(v))))

    op = drawn(LinearAttention(DIM, HEADS, HEADS, HEAD_DIM, **given))
    q, k, v = op.in_proj(x).chunk(3, -1)
    q, k = (
        nn.functional.elu(t) + 1
        for t in (normed(q, op.q_norm, kind, over), normed(k, op.k_norm, kind, over))
    )
    weight = q @ k.transpose(-1, -2)
    y = (weight / (weight.sum(-1, keepdim=True) + op.eps)) @ heads_of(v)
    torch.testing.assert_close(op(x), op.out_proj(y.transpose(1, 2).flatten(2)))

    # With all tokens in the window its softmax is the whole.
    op = drawn(LinearWindowAttention(DIM, HEADS, TOKENS, HEADS, HEAD_DIM, scale=SCALE, **given))
    q, k, v = op.in_proj(x).chunk(3, -1)
    q, k = normed(q, op.q_norm, kind, over), normed(k, op.k_norm, kind, over)
    torch.testing.assert_close(op(x), op.out_proj(dense(q, k, heads_of(v))))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("second", ["own", "hidden", "shared"])
@pytest.mark.parametrize(("kind", "over"), KINDS)
def test_joint_attention(kind, over, second, swapped):
    """Both streams in one softmax, with a mask and rotary positions in the order of the tokens."""
    wide = DIM if second == "shared" else 10
    op = drawn(
        JointAttention(
            DIM, wide, HEADS, None, HEAD_DIM, second, swapped, "half", kind, over, EPS, None, SCALE
        )
    )
    x, context = x_of(), x_of(5)[..., :wide]
    tokens = TOKENS + 5
    angle = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * torch.tensor(
        [1.0, 0.3, 1.0, 0.3]
    )
    mask = torch.arange(tokens) % 4 != 3
    y = op(x, context, mask.expand(2, 1, 1, -1), angle.cos(), angle.sin())

    apart = second != "shared"
    streams = [(x, op.in_proj, op.q_norm, op.k_norm)]
    streams += (
        [(context, op.in_proj_2, op.q_norm_2, op.k_norm_2)]
        if apart
        else [(context, *streams[0][1:])]
    )
    parts = []
    for stream, proj, q_norm, k_norm in streams:
        q, k, v = proj(stream).chunk(3, -1)
        parts.append([normed(q, q_norm, kind, over), normed(k, k_norm, kind, over), heads_of(v)])
    parts = parts[::-1] if swapped else parts
    q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
    q, k = (
        rotate(t.transpose(1, 2), angle.cos(), angle.sin(), "half").transpose(1, 2) for t in (q, k)
    )
    whole = dense(q, k, v, mask)
    first, last = whole.split([5, TOKENS] if swapped else [TOKENS, 5], 1)
    y1, y2 = (last, first) if swapped else (first, last)
    if second == "hidden":
        torch.testing.assert_close(y, op.out_proj(y1))
    else:
        torch.testing.assert_close(
            y, (op.out_proj(y1), (op.out_proj_2 if apart else op.out_proj)(y2))
        )


def test_one_angle_a_pair():
    """`pairs` reads the cosine of a pair at its first feature, the sine at its second; tables in any of four shapes."""
    x = torch.randn(2, 5, 3, 4)
    cos, sin = torch.randn(5, 4), torch.randn(5, 4)
    wanted = x.clone()
    for a in (0, 2):
        c, s = cos[:, None, a], sin[:, None, a + 1]
        wanted[..., a] = x[..., a] * c - x[..., a + 1] * s
        wanted[..., a + 1] = x[..., a + 1] * c + x[..., a] * s
    for shape in ((5, 4), (1, 5, 4), (1, 1, 5, 4), (1, 5, 1, 4)):
        torch.testing.assert_close(
            rotate(x, cos.reshape(shape), sin.reshape(shape), "pairs"), wanted
        )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Attention(8, 2, qk_norm="l2"), "attention: unknown qk_norm 'l2'"),
        (lambda: SlidingWindow(8, 2, 2, qk_norm="rms_norm", norm_over="token"), "unknown norm_over 'token'"),
        (lambda: JointAttention(8, 6, 2, second="shared"), "streams of 8 and 6 features share no maps"),
        (lambda: JointAttention(8, 6, 2, second="none"), "unknown second 'none'"),
    ],
)  # fmt: skip
def test_bad_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()
