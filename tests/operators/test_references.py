"""Every later operator, and every kept input, against its definition: dense masks and sequential scans."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.attention import Attention, CrossAttention, LatentAttention
from graftc.operators.conv import DepthwiseConv
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY
from graftc.operators.joint import JointAttention
from graftc.operators.linear import LowRank
from graftc.operators.linear_attention import LinearAttention, LinearWindowAttention
from graftc.operators.local_2d import JointLocalAttention2d, LocalAttention2d
from graftc.operators.mamba2 import Mamba2, ssd, ssd_scan
from graftc.operators.mlp import MlpHyenaX
from graftc.operators.norms import LayerNorm, RmsNorm
from graftc.operators.parallel import GateMerge
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS, HEAD_DIM = 12, 4, 4


class Given(nn.Module):
    """An operator with the inputs that it keeps, made from x alone, so that the harness can call it."""

    def __init__(self, op: nn.Module, inputs) -> None:
        super().__init__()
        self.op = op
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, **self.inputs(x))


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def by_head(x: Tensor, heads: int, times: int = 1) -> Tensor:
    """[batch, heads · times, tokens, width], each head `times` times."""
    return torch.stack([part for part in x.chunk(heads, dim=-1) for _ in range(times)], dim=1)


def qkv(w: dict[str, Tensor], x: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = linear(w, "in_proj", x).split(
        [HEADS * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM], dim=-1
    )
    each = HEADS // kv_heads
    return by_head(q, HEADS), by_head(k, kv_heads, each), by_head(v, kv_heads, each)


def joined(w: dict[str, Tensor], weight: Tensor, v: Tensor, name: str = "out_proj") -> Tensor:
    """out(Σ_j w_ij v_j / Σ_j w_ij), the heads side by side."""
    y = (weight / weight.sum(-1, keepdim=True)) @ v
    return linear(w, name, torch.cat(list(y.unbind(1)), dim=-1))


def turned(x: Tensor, cos: Tensor, sin: Tensor, form: str) -> Tensor:
    """Each pair of features turned by its angle, pair by pair."""
    width = x.shape[-1]
    pairs = (
        [(i, i + width // 2) for i in range(width // 2)]
        if form == "half"
        else [(i, i + 1) for i in range(0, width, 2)]
    )
    y = x.clone()
    for a, b in pairs:
        y[..., a] = x[..., a] * cos[..., a] - x[..., b] * sin[..., a]
        y[..., b] = x[..., b] * cos[..., b] + x[..., a] * sin[..., b]
    return y


def angles(x: Tensor, form: str = "half") -> dict[str, Tensor]:
    position = torch.arange(x.shape[1], dtype=torch.float64).unsqueeze(1)
    angle = position * torch.tensor([1.0, 0.3], dtype=torch.float64)
    angle = torch.cat((angle, angle), -1) if form == "half" else angle.repeat_interleave(2, -1)
    return {"cos": angle.cos().to(x.dtype), "sin": angle.sin().to(x.dtype)}


def key_mask(x: Tensor) -> dict[str, Tensor]:
    """True where a key is seen: the first always, then two of three."""
    seen = torch.arange(x.shape[1]) % 3 != 2
    return {"mask": seen.expand(x.shape[0], 1, 1, -1)}


def added_mask(x: Tensor) -> dict[str, Tensor]:
    """A bias that differs from query to query and from head to head."""
    n = torch.arange(x.shape[1], dtype=torch.float64)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).reshape(HEADS, 1, 1)
    return {"mask": (-slopes * (n.unsqueeze(1) - n).abs()).to(x.dtype).unsqueeze(0)}


def weight_of(scores: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("mask")
    if mask is None:
        return scores.exp()
    return scores.exp() * mask if mask.dtype == torch.bool else (scores + mask).exp()


def of(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("op."): p for n, p in w.items()}


def apart(x: Tensor) -> Tensor:
    n = torch.arange(x.shape[1])
    return n.unsqueeze(1) - n  # i − j


SEEN = {
    "all": lambda x: apart(x) == apart(x),
    "causal": lambda x: apart(x) >= 0,
    "window": lambda x: apart(x).abs() <= 3,
    "causal window": lambda x: (apart(x) >= 0) & (apart(x) <= 3),
}
SOFTMAX = {
    "all": lambda **k: Attention(DIM, HEADS, head_dim=HEAD_DIM, **k),
    "causal": lambda **k: Attention(DIM, HEADS, head_dim=HEAD_DIM, causal=True, **k),
    "window": lambda **k: SlidingWindow(DIM, HEADS, 3, head_dim=HEAD_DIM, **k),
    "causal window": lambda **k: SlidingWindow(DIM, HEADS, 3, head_dim=HEAD_DIM, causal=True, **k),
}
INPUTS = {
    "half": angles,
    "interleaved": lambda x: angles(x, "interleaved"),
    "boolean": key_mask,
    "additive": added_mask,
    "both": lambda x: {**angles(x), **key_mask(x)},
}


@pytest.mark.parametrize("kept", INPUTS)
@pytest.mark.parametrize("kind", SOFTMAX)
def test_softmax_with_what_it_keeps(agrees, kind, kept):
    form = {"both": "half", "half": "half", "interleaved": "interleaved"}.get(kept, "none")
    inputs, kv_heads = INPUTS[kept], 2

    def reference(w, x):
        q, k, v = qkv(of(w), x, kv_heads)
        given = inputs(x)
        if form != "none":
            q, k = (turned(t, given["cos"], given["sin"], form) for t in (q, k))
        weight = weight_of(q @ k.transpose(-1, -2) / HEAD_DIM**0.5, given) * SEEN[kind](x)
        if "window" in kind:  # a query may find all that it sees masked: it is then left out here
            weight = weight + 1e-300
        return joined(of(w), weight, v)

    module = Given(SOFTMAX[kind](kv_heads=kv_heads, rotary=form), inputs)
    agrees(module, reference, DIM, lengths=(7, 100))


def test_qk_norm(agrees):
    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def reference(w, x):
        q, k, v = qkv(w, x, 2)
        q, k = norm(q, w["q_norm.weight"]), norm(k, w["k_norm.weight"])
        return joined(w, (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).exp(), v)

    module = Attention(DIM, HEADS, 2, HEAD_DIM, qk_norm="rms_norm")
    nn.init.uniform_(module.q_norm.weight, 0.5, 2)
    agrees(module, reference, DIM, lengths=(1, 64))


@pytest.mark.parametrize("causal", [False, True])
def test_latent_attention(agrees, causal):
    def reference(w, x):
        q = by_head(linear(w, "q_proj", x), HEADS)
        k, v = linear(w, "kv_up", linear(w, "kv_down", x)).chunk(2, -1)
        k, v = by_head(k, HEADS), by_head(v, HEADS)
        weight = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).exp()
        return joined(w, weight * SEEN["causal" if causal else "all"](x), v)

    agrees(LatentAttention(DIM, HEADS, 5, HEAD_DIM, causal), reference, DIM)


def test_cross_attention(agrees):
    context = torch.randn(1, 9, 6, dtype=torch.float64)
    seen = (torch.arange(9) < 5).unsqueeze(0)

    def inputs(x):
        return {"context": context.to(x.dtype).expand(x.shape[0], -1, -1), "mask": seen}

    def reference(w, x):
        given = inputs(x)
        q = by_head(linear(of(w), "q_proj", x), HEADS)
        k, v = linear(of(w), "kv_proj", given["context"]).chunk(2, -1)
        k, v = by_head(k, 2, 2), by_head(v, 2, 2)
        return joined(of(w), (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).exp() * seen, v)

    agrees(Given(CrossAttention(DIM, 6, HEADS, 2, HEAD_DIM), inputs), reference, DIM)


def features(w, name, x, kind, each=1):
    """φ(x) of [batch, heads, tokens, width]."""
    if kind == "elu1":
        return F.elu(x) + 1
    if kind == "relu":
        return F.relu(x)
    u = x @ w[f"{name}.weight"].repeat_interleave(each, 0)
    up, down = u.exp(), (-u).exp()
    return torch.cat((up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)), -1)


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_with_learned_features(agrees, causal):
    def reference(w, x):
        q, k, v = qkv(w, x, 2)
        phi = features(w, "feature_q", q, "softmax_pair")
        weight = phi @ features(w, "feature_k", k, "softmax_pair", 2).transpose(-1, -2)
        weight = weight * SEEN["causal" if causal else "all"](x)
        y = (weight / (weight.sum(-1, keepdim=True) + 1e-6)) @ v
        return linear(w, "out_proj", torch.cat(list(y.unbind(1)), -1))

    module = LinearAttention(
        DIM, HEADS, 2, HEAD_DIM, feature="softmax_pair", features=3, causal=causal
    )
    agrees(module, reference, DIM)


@pytest.mark.parametrize("kept", ["half", "boolean"])
def test_linear_attention_with_what_it_keeps(agrees, kept):
    form = "half" if kept == "half" else "none"

    def reference(w, x):
        q, k, v = qkv(of(w), x, 2)
        given = INPUTS[kept](x)
        if form == "half":
            q, k = (turned(t, given["cos"], given["sin"], form) for t in (q, k))
        weight = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
        weight = weight * given.get("mask", 1)
        y = (weight / (weight.sum(-1, keepdim=True) + 1e-6)) @ v
        return linear(of(w), "out_proj", torch.cat(list(y.unbind(1)), -1))

    module = Given(LinearAttention(DIM, HEADS, 2, HEAD_DIM, rotary=form), INPUTS[kept])
    agrees(module, reference, DIM, lengths=(7, 100))


@pytest.mark.parametrize("kept", ["nothing", "half", "boolean"])
@pytest.mark.parametrize(
    ("window", "causal", "feature"), [(5, True, "softmax_pair"), (16, False, "softmax_pair"), (64, True, "relu")]
)  # fmt: skip
def test_linear_window_attention(agrees, window, causal, feature, kept):
    form = "half" if kept == "half" else "none"
    inputs = INPUTS.get(kept, lambda x: {})

    def reference(w, x):
        w, given = of(w), inputs(x)
        q, k, v = qkv(w, x, 2)
        if form == "half":
            q, k = (turned(t, given["cos"], given["sin"], form) for t in (q, k))
        block = torch.arange(x.shape[1]) // window
        near = (block.unsqueeze(1) - block).abs() <= 1
        mask = given.get("mask", torch.ones(1, dtype=torch.bool))
        seen = SEEN["causal" if causal else "all"](x) & mask
        inside = near & seen
        scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
        top = scores.masked_fill(~inside, -math.inf).amax(-1, keepdim=True)
        share = 1 / (1 + (-w["factor"]).exp()).reshape(-1, 1, 1)
        weight = torch.where(inside, share * (scores - top.clamp(min=-1e300)).exp(), 0.0)
        phi = features(w, "feature_q", q, feature)
        phi = phi @ features(w, "feature_k", k, feature, 2).transpose(-1, -2)
        weight = weight + phi * (~near & seen)
        y = (weight / (weight.sum(-1, keepdim=True) + 1e-12)) @ v
        return linear(w, "out_proj", torch.cat(list(y.unbind(1)), -1))

    op = LinearWindowAttention(
        DIM, HEADS, window, 2, HEAD_DIM, feature, 3, causal=causal, rotary=form
    )
    agrees(
        Given(op, inputs),
        reference,
        DIM,
        lengths=(7, 100) if kept != "nothing" else (1, 7, 64, 100),
    )


def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A causal depthwise convolution, tap by tap."""
    taps, y = weight.shape[-1], bias.expand_as(x)
    for t in range(taps):
        back = taps - 1 - t
        moved = torch.cat((torch.zeros_like(x[:, :back]), x[:, : x.shape[1] - back]), 1)
        y = y + weight[:, 0, t] * moved[:, : x.shape[1]]
    return y


def mamba(w, x, state, head_dim, groups, causal):
    inner = w["out_proj.weight"].shape[1]
    mixed = inner + 2 * groups * state
    heads = inner // head_dim
    z, u, dt = linear(w, "in_proj", x).split([inner, mixed, heads], -1)

    def scan(u, dt, suffix):
        u = shifted(u, w[f"conv1d{suffix}.weight"], w[f"conv1d{suffix}.bias"])
        u = u / (1 + (-u).exp())
        xs, b, c = u.split([inner, groups * state, groups * state], -1)
        dt = (1 + (dt + w[f"dt_bias{suffix}"]).exp()).log()
        a = -w[f"A_log{suffix}"].exp()
        rows, h = [], x.new_zeros(x.shape[0], heads, state, head_dim)
        group = torch.arange(heads) // (heads // groups)
        for i in range(x.shape[1]):
            now = xs[:, i].reshape(-1, heads, head_dim)
            bi = b[:, i].reshape(-1, groups, state)[:, group]
            ci = c[:, i].reshape(-1, groups, state)[:, group]
            step = dt[:, i]
            h = (a * step).exp()[..., None, None] * h
            h = h + (step.unsqueeze(-1) * bi).unsqueeze(-1) * now.unsqueeze(-2)
            y = (ci.unsqueeze(-1) * h).sum(-2) + w[f"D{suffix}"].unsqueeze(-1) * now
            rows.append(y.flatten(1))
        return torch.stack(rows, 1)

    y = scan(u, dt, "")
    if not causal:
        y = y + scan(u.flip(1), dt.flip(1), "_back").flip(1)
    y = y * z / (1 + (-z).exp())
    parts = [p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt() for p in y.chunk(groups, -1)]
    return linear(w, "out_proj", torch.cat(parts, -1) * w["norm.weight"])


@pytest.mark.parametrize(("groups", "causal"), [(1, True), (2, True), (2, False)])
def test_mamba2(agrees, groups, causal):
    agrees(
        Mamba2(8, state=3, head_dim=4, groups=groups, causal=causal),
        lambda w, x: mamba(w, x, 3, 4, groups, causal),
        8,
    )


def test_the_chunked_scan_is_the_sequential_one_over_1024_tokens():
    """Forward and gradients, with decays that forget in a token and decays that never do."""
    torch.manual_seed(0)
    shapes = ((2, 1024, 4, 3), (2, 1024, 4), (2, 1024, 2, 5), (2, 1024, 2, 5))
    given = [torch.randn(s, dtype=torch.float64) for s in shapes]
    given[1] = -given[1].abs() * torch.tensor([1e-4, 0.1, 1, 10], dtype=torch.float64)
    given = [t.requires_grad_() for t in given]
    fast, slow = ssd(*given, 64), ssd_scan(*given)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    tangent = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad(fast, given, tangent),
        torch.autograd.grad(slow, given, tangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


GRIDS = ((1, 1), (1, 7), (8, 8), (10, 10), (5, 20))


def disc(height: int, width: int, radius: int) -> Tensor:
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    return (y.unsqueeze(1) - y) ** 2 + (x.unsqueeze(1) - x) ** 2 < radius**2


@pytest.mark.parametrize("radius", [1, 3, 30])
@pytest.mark.parametrize("grid", GRIDS)
def test_local_attention_2d(agrees, grid, radius):
    def reference(w, x):
        q, k, v = qkv(w, x, 2)
        weight = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).exp() * disc(*grid, radius)
        return joined(w, weight, v)

    module = LocalAttention2d(DIM, HEADS, radius, *grid, kv_heads=2, head_dim=HEAD_DIM)
    agrees(module, reference, DIM, lengths=(grid[0] * grid[1],), fixed=True)


GRID, OTHERS = (6, 7), 5
LOCAL, TEXT = GRID[0] * GRID[1], slice(0, OTHERS)
"""In the attention the text's tokens come first, then the grid's."""
GROUPS = "text: full, image: local"


def masks(dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a query's mask, what differs: the key; the sample and the head; the query; one word in boolean form."""
    count, generator = OTHERS + LOCAL, torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 1, count, generator=generator) > 0.3
    seen[..., TEXT] = True  # so that every token sees something
    added = torch.randn(2, HEADS, count, count, generator=generator, dtype=dtype)
    return {
        "of keys": seen,
        "of queries": (torch.rand(count, count, generator=generator) > 0.3)
        | torch.eye(count).bool(),
        "added": added,
        "added, of three dimensions": added[:, 0],
    }


def of_masked_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Text sees all, the image's tokens its disc and the text; all of it dense."""
    seen = torch.ones(OTHERS + LOCAL, OTHERS + LOCAL, dtype=torch.bool)
    seen[OTHERS:, OTHERS:] = disc(*GRID, 3)
    mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    weight = weight_of(
        q @ k.transpose(-1, -2) / HEAD_DIM**0.5, {} if mask is None else {"mask": mask}
    )
    weight = weight * seen
    y = (weight / weight.sum(-1, keepdim=True)) @ v
    return torch.cat(list(y.unbind(1)), -1)


@pytest.mark.parametrize("kept", ["of keys", "of queries", "added", "added, of three dimensions"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("beside", [True, False])
def test_local_attention_2d_with_a_mask(agrees, kept, kv_heads, beside):
    """On the grid alone, and beside text; the mask is also one of queries that stand in no disc of the other."""
    count = OTHERS + LOCAL if beside else LOCAL

    def inputs(x: Tensor) -> dict[str, Tensor]:
        mask = masks(torch.float64)[kept][..., -count:]
        mask = mask if mask.shape[-2] == 1 else mask[..., -count:, :]
        own = torch.arange(count)
        if mask.dtype == torch.bool and not beside:
            mask = mask | (own == own.unsqueeze(1))  # a token sees itself
        mask = mask[: x.shape[0]] if mask.ndim > 2 else mask
        return {"mask": mask if mask.dtype == torch.bool else mask.to(x.dtype)}

    def reference(w, x):
        q, k, v = qkv(of(w), x, kv_heads)
        mask = inputs(x)["mask"]
        if beside:
            return linear(of(w), "out_proj", of_masked_scores(q, k, v, mask))
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
        weight = weight_of(q @ k.transpose(-1, -2) / HEAD_DIM**0.5, {"mask": mask})
        return joined(of(w), weight * disc(*GRID, 3), v)

    given = {"groups": GROUPS} if beside else {}
    op = LocalAttention2d(DIM, HEADS, 3, *GRID, kv_heads=kv_heads, head_dim=HEAD_DIM, **given)
    module = Given(op, inputs).double()
    x = torch.randn(2, count, DIM, dtype=torch.float64, requires_grad=True)
    w = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    found, wanted = module(x), reference(w, x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    tangent = torch.randn_like(wanted)
    ours = torch.autograd.grad(found, [x, *module.parameters()], tangent)
    right = torch.autograd.grad(wanted, [x, *w.values()], tangent)
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [None, "of keys", "of queries", "added"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("qk_norm", "rotary"), [("none", "none"), ("rms_norm", "interleaved")])
@pytest.mark.parametrize("local", [False, True])
def test_two_streams(local, text_first, qk_norm, rotary, kv_heads, kept):
    """The joint operators against dense attention over both streams, outputs and gradients."""
    torch.manual_seed(0)
    kwargs = {"qk_norm": qk_norm, "rotary": rotary, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
    if local:
        names = "text, image" if text_first else "image, text"
        op = JointLocalAttention2d(DIM, DIM, HEADS, 3, *GRID, names, GROUPS, first="text", **kwargs)
    else:
        op = JointAttention(DIM, DIM, HEADS, swapped=not text_first, **kwargs)
    op = op.double()
    counts = (OTHERS, LOCAL) if text_first else (LOCAL, OTHERS)
    given = [torch.randn(2, n, DIM, dtype=torch.float64, requires_grad=True) for n in counts]
    table = angles(torch.zeros(1, OTHERS + LOCAL, 1, dtype=torch.float64), "interleaved")
    mask = None if kept is None else masks(torch.float64)[kept]
    y1, y2 = op(*given, mask, **(table if rotary != "none" else {}))

    w = {n: p.detach().clone().requires_grad_() for n, p in op.named_parameters()}
    parts = [[], [], []]
    for x, suffix in zip(given, ("", "_2"), strict=True):
        rows = [HEADS * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]
        for i, t in enumerate(linear(w, f"in_proj{suffix}", x).split(rows, -1)):
            own = HEADS if i == 0 else kv_heads
            t = by_head(t, own, HEADS // own)
            if qk_norm != "none" and i < 2:
                scale = w[f"{'qk'[i]}_norm{suffix}.weight"]
                t = scale * t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            parts[i].append(t)
    order = (0, 1) if text_first else (1, 0)  # text comes first in the attention
    q, k, v = (torch.cat([p[i] for i in order], dim=2) for p in parts)
    if rotary != "none":
        q, k = (turned(t, table["cos"], table["sin"], rotary) for t in (q, k))
    if local:
        y = of_masked_scores(q, k, v, mask)
    else:
        weight = weight_of(
            q @ k.transpose(-1, -2) / HEAD_DIM**0.5, {} if mask is None else {"mask": mask}
        )
        y = torch.cat(list(((weight / weight.sum(-1, keepdim=True)) @ v).unbind(1)), -1)
    text, image = y.split([OTHERS, LOCAL], dim=1)
    first, second = (text, image) if text_first else (image, text)
    wanted = linear(w, "out_proj", first), linear(w, "out_proj_2", second)
    torch.testing.assert_close((y1, y2), wanted, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(y1.square().sum() + y2.sum(), [*given, *op.parameters()])
    right = torch.autograd.grad(wanted[0].square().sum() + wanted[1].sum(), [*given, *w.values()])
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def conv_2d(x, weight, bias, grid):
    """Tap by tap over the grid, centred."""
    height, width = grid
    taps = weight.shape[-1]
    centre = (taps - 1) // 2
    image = x.reshape(x.shape[0], height, width, -1)
    wide = F.pad(image, (0, 0, taps, taps, taps, taps))
    y = bias.expand_as(image)
    for a in range(taps):
        for b in range(taps):
            top, left = taps + a - centre, taps + b - centre
            y = y + weight[:, 0, a, b] * wide[:, top : top + height, left : left + width]
    return y.reshape(x.shape)


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("cls", [HyenaX, HyenaY, HyenaSE])
@pytest.mark.parametrize("order", [2, 3])
def test_hyena_on_a_grid_and_of_any_order(agrees, cls, kernel, order):
    grid = (4, 6)

    def reference(w, x):
        u = linear(w, "in_proj", x)
        if "short_filter.weight" in w:
            u = conv_2d(u, w["short_filter.weight"], w["short_filter.bias"], grid)
        q, *gates, y = u.chunk(order + 1, -1)
        for gate in reversed(gates):
            y = gate * y
            if "inner_filter.weight" in w:
                y = conv_2d(y, w["inner_filter.weight"], w["inner_filter.bias"], grid)
        return linear(w, "out_proj", q * y)

    module = cls(6, kernel, causal=False, order=order, dims=2, height=4, width=6)
    agrees(module, reference, 6, lengths=(24,), fixed=True)


def test_depthwise_conv_on_a_grid(agrees):
    module = DepthwiseConv(6, 3, init="random", dims=2, height=4, width=6)
    agrees(
        module,
        lambda w, x: conv_2d(x, w["filter.weight"], w["filter.bias"], (4, 6)),
        6,
        lengths=(24,),
        fixed=True,
    )
    x = torch.randn(2, 24, 6)
    for kernel in (1, 3, 4):
        assert torch.equal(DepthwiseConv(6, kernel, dims=2, height=4, width=6)(x), x)


@pytest.mark.parametrize("kernel", [1, 4])
def test_mlp_hyena_x(agrees, kernel):
    def reference(w, x):
        u = linear(w, "in_proj", x).transpose(1, 2)  # the channels are the steps
        u = shifted(u, w["short_filter.weight"], w["short_filter.bias"]).transpose(1, 2)
        q, k, v = u.chunk(3, -1)
        return linear(w, "out_proj", q * k * v)

    agrees(MlpHyenaX(6, 7, 1.5, kernel), reference, 6, lengths=(7,), fixed=True)


def test_low_rank(agrees):
    agrees(LowRank(DIM, 5, 3), lambda w, x: linear(w, "up", linear(w, "down", x)), DIM)


@pytest.mark.parametrize("affine", [False, True])
def test_norms(agrees, affine):
    def rms(w, x):
        y = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return y * w["weight"] if affine else y

    def layer(w, x):
        far = x - x.mean(-1, keepdim=True)
        y = far / (far.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return y * w["weight"] + w["bias"] if affine else y

    for cls, reference in ((RmsNorm, rms), (LayerNorm, layer)):
        module = cls(DIM, 1e-3, affine)
        for parameter in module.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
        agrees(module, reference, DIM, lengths=(1, 7, 64))


def test_gate_merge():
    merge = GateMerge(DIM, 3)
    branches = [torch.randn(2, 5, DIM) for _ in range(3)]
    logits = torch.cat(branches, -1) @ merge.gate.weight.T + merge.gate.bias
    weight = logits.exp() / logits.exp().sum(-1, keepdim=True)
    wanted = sum(weight[..., i : i + 1] * b for i, b in enumerate(branches))
    torch.testing.assert_close(merge(*branches), wanted)


def test_mamba2_has_the_names_and_shapes_of_mamba_ssm():
    with torch.device("meta"):
        module = Mamba2(1152, state=64, head_dim=16)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "in_proj.weight": (2 * 2304 + 2 * 64 + 144, 1152),
        "conv1d.weight": (2304 + 128, 1, 4),
        "conv1d.bias": (2304 + 128,),
        "dt_bias": (144,),
        "A_log": (144,),
        "D": (144,),
        "norm.weight": (2304,),
        "out_proj.weight": (1152, 2304),
    }


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mamba2(8, head_dim=3), "width 16 is not divisible by head_dim 3"),
        (lambda: Mamba2(8, head_dim=4, groups=3), "heads 4 is not a multiple of groups 3"),
        (lambda: Mamba2(8, kernel=0), "kernel is 0"),
        (lambda: LinearWindowAttention(8, 2, 0), "window is 0"),
        (lambda: LatentAttention(8, 2, 0), "rank is 0"),
        (lambda: LatentAttention(10, 4, 2), "dim 10 is not divisible by heads 4"),
        (lambda: LowRank(8, 4, 5), "rank is 5, wanted 1 to 4"),
        (lambda: MlpHyenaX(8, 0), "tokens is 0"),
        (lambda: HyenaX(8, 3, dims=2, height=2, width=2), "write causal = false"),
        (lambda: HyenaX(8, 3, causal=False, dims=2), "the grid is needed"),
        (lambda: HyenaX(8, order=1), "order is 1"),
        (lambda: LocalAttention2d(8, 2, 0, 4, 4), "radius is 0"),
        (lambda: JointLocalAttention2d(8, 8, 2, 2, 4, 4, "a, b", "a: full, b: full"), "one local"),
        (lambda: JointLocalAttention2d(8, 8, 2, 2, 4, 4, "a, b", "a: full, c: local"), "streams"),
        (lambda: Attention(8, 2, rotary="whole"), "unknown rotary 'whole'"),
        (lambda: Attention(8, 2, rotary="half")(torch.zeros(1, 3, 8)), "cos and sin are not given"),
        (lambda: MlpHyenaX(8, 5)(torch.zeros(1, 6, 8)), "6 tokens, built for 5"),
        (
            lambda: LocalAttention2d(8, 2, 2, 4, 4)(torch.zeros(1, 6, 8)),
            "6 tokens, built for a grid",
        ),
        (
            lambda: LinearAttention(8, 2)(torch.zeros(1, 3, 8), torch.ones(1, 1, 3, 3).bool()),
            "differs from query to query",
        ),
    ],
)
def test_bad_sizes(make, says):
    with pytest.raises(ValueError, match=says):
        make()
