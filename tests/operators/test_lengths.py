"""Every operator at every length against its definition, written out densely or token by token; and on nothing at all.

`TABLE` has a row for each operator that a rule can name, and for each form of it that computes otherwise: a cell is a
row at a length, with a batch of 1 and of 3. Output and gradients are compared in float64, output in float32 and bfloat16.
`test_references.py` and its neighbours go deeper: what each operator keeps of its site, `gradcheck`, bad sizes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graftc.operators.attention import Attention, CrossAttention, LatentAttention
from graftc.operators.conv import DepthwiseConv
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY
from graftc.operators.joint import JointAttention
from graftc.operators.linear import LowRank, TokenLinear
from graftc.operators.linear_attention import LinearAttention, LinearWindowAttention
from graftc.operators.local_2d import JointLocalAttention2d, LocalAttention2d
from graftc.operators.mamba2 import Mamba2
from graftc.operators.mlp import Mlp, MlpHyenaX
from graftc.operators.norms import LayerNorm, RmsNorm
from graftc.operators.parallel import BlockSumMerge, GateMerge, LerpMerge, LinearMerge, SumMerge
from graftc.operators.sliding_window import SlidingWindow
from graftc.operators.specs import MERGES, SPECS
from graftc.operators.structure import Identity, Zero

DIM, HEADS, WIDE, OTHERS = 8, 2, 4, 5
LENGTHS = (1, 7, 64, 100, 1024)
SIDES = {1: (1, 1), 7: (1, 7), 64: (8, 8), 100: (5, 20), 1024: (32, 32)}

Weights = dict[str, Tensor]
Definition = Callable[[Weights, Tensor], Tensor]


class With(nn.Module):
    """An operator of two streams, or of several branches, as a function of one stream."""

    def __init__(self, op: nn.Module, inputs: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.op = op
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(*self.inputs(x))
        return torch.cat(y, 1) if isinstance(y, tuple) else y


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """[batch, HEADS, tokens, WIDE]: a head that several share stands there several times."""
    return torch.stack([p for p in x.chunk(count, -1) for _ in range(HEADS // count)], 1)


def joined(w: Weights, weight: Tensor, v: Tensor, name: str = "out_proj") -> Tensor:
    y = (weight / weight.sum(-1, keepdim=True)) @ v
    return affine(w, name, torch.cat(list(y.unbind(1)), -1))


def rows_of(w: Weights, x: Tensor, kv: int = HEADS, name: str = "in_proj") -> list[Tensor]:
    q, k, v = affine(w, name, x).split([HEADS * WIDE, kv * WIDE, kv * WIDE], -1)
    return [heads(q), heads(k, kv), heads(v, kv)]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / WIDE**0.5).exp()


def away(x: Tensor) -> Tensor:
    n = torch.arange(x.shape[1])
    return n.unsqueeze(1) - n


def everything(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def past(x: Tensor) -> Tensor:
    return away(x) >= 0


def disc(count: int) -> Tensor:
    """Tokens less than 3 away on the grid of so many tokens."""
    n = torch.arange(count)
    y, x = n // SIDES[count][1], n % SIDES[count][1]
    return (y.unsqueeze(1) - y) ** 2 + (x.unsqueeze(1) - x) ** 2 < 9


def softmax(seen: Callable[[Tensor], Tensor], kv: int = HEADS) -> Definition:
    def reference(w: Weights, x: Tensor) -> Tensor:
        q, k, v = rows_of(w, x, kv)
        return joined(w, scores(q, k) * seen(x), v)

    return reference


def latent(w: Weights, x: Tensor) -> Tensor:
    k, v = affine(w, "kv_up", affine(w, "kv_down", x)).chunk(2, -1)
    return joined(w, scores(heads(affine(w, "q_proj", x)), heads(k)), heads(v))


def phi(w: Weights, name: str, x: Tensor, kind: str) -> Tensor:
    if kind == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if kind == "relu":
        return x * (x > 0)
    u = x @ w[f"{name}.weight"]
    up, down = u.exp(), (-u).exp()
    return torch.cat((up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)), -1)


def linear(kind: str, seen: Callable[[Tensor], Tensor]) -> Definition:
    def reference(w: Weights, x: Tensor) -> Tensor:
        q, k, v = rows_of(w, x)
        weight = phi(w, "feature_q", q, kind) @ phi(w, "feature_k", k, kind).transpose(-1, -2)
        weight = weight * seen(x)
        y = (weight / (weight.sum(-1, keepdim=True) + 1e-6)) @ v
        return affine(w, "out_proj", torch.cat(list(y.unbind(1)), -1))

    return reference


def hybrid(window: int, seen: Callable[[Tensor], Tensor]) -> Definition:
    """Softmax in a token's block and its neighbours, linear attention elsewhere, one normaliser."""

    def reference(w: Weights, x: Tensor) -> Tensor:
        q, k, v = rows_of(w, x)
        block = torch.arange(x.shape[1]) // window
        near = (block.unsqueeze(1) - block).abs() <= 1
        raw = (q @ k.transpose(-1, -2) / WIDE**0.5).masked_fill(~(near & seen(x)), -math.inf)
        share = w["factor"].sigmoid().reshape(1, HEADS, 1, 1)
        soft = share * (raw - raw.amax(-1, keepdim=True)).exp()
        far = phi(w, "", q, "elu1") @ phi(w, "", k, "elu1").transpose(-1, -2)
        return joined(w, soft + far * (seen(x) & ~near), v)

    return reference


def filtered(w: Weights, name: str, x: Tensor, causal: bool) -> Tensor:
    """y_i = bias + Σ_t w_t · x_{i + t − centre}, tap by tap."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    taps, tokens = weight.shape[-1], x.shape[1]
    centre = taps - 1 if causal else (taps - 1) // 2
    y = bias.expand_as(x)
    for t in range(taps):
        at = torch.arange(tokens) + t - centre
        inside = ((at >= 0) & (at < tokens)).unsqueeze(1)
        y = y + weight[:, 0, t] * (x[:, at.clamp(0, tokens - 1)] * inside)
    return y


def on_grid(w: Weights, name: str, x: Tensor) -> Tensor:
    """The same over a grid, row after row, centred."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    taps, (height, width) = weight.shape[-1], SIDES[x.shape[1]]
    centre, y = (taps - 1) // 2, bias.expand_as(x)
    n = torch.arange(height * width)
    for a in range(taps):
        for b in range(taps):
            row, column = n // width + a - centre, n % width + b - centre
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            y = y + weight[:, 0, a, b] * (x[:, at] * inside.unsqueeze(1))
    return y


def hyena(causal: bool, grid: bool = False) -> Definition:
    def conv(w: Weights, name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in w:
            return x
        return on_grid(w, name, x) if grid else filtered(w, name, x, causal)

    def reference(w: Weights, x: Tensor) -> Tensor:
        q, k, v = conv(w, "short_filter", affine(w, "in_proj", x)).chunk(3, -1)
        return affine(w, "out_proj", q * conv(w, "inner_filter", k * v))

    return reference


def mamba(w: Weights, x: Tensor, suffixes: tuple[str, ...] = ("",)) -> Tensor:
    """The state carried from token to token; state 4, heads of 4, one group."""
    inner, state = 2 * DIM, 4
    z, u, dt = affine(w, "in_proj", x).split([inner, inner + 2 * state, inner // 4], -1)
    y = torch.zeros_like(z)
    for suffix in suffixes:
        turn = (lambda t: t.flip(1)) if suffix else (lambda t: t)
        mixed = filtered(w, f"conv1d{suffix}", turn(u), causal=True)
        mixed = mixed / (1 + (-mixed).exp())
        xs, b, c = mixed.split([inner, state, state], -1)
        step = (1 + (turn(dt) + w[f"dt_bias{suffix}"]).exp()).log()
        decay = (-w[f"A_log{suffix}"].exp() * step).exp()
        xs = xs.unflatten(-1, (-1, 4))
        h, rows = x.new_zeros(x.shape[0], inner // 4, state, 4), []
        added = (step.unsqueeze(-1) * b.unsqueeze(2)).unsqueeze(-1) * xs.unsqueeze(-2)
        for i in range(x.shape[1]):
            h = decay[:, i, :, None, None] * h + added[:, i]
            rows.append((c[:, i, None, :, None] * h).sum(-2))
        out = torch.stack(rows, 1) + w[f"D{suffix}"].unsqueeze(-1) * xs
        y = y + turn(out.flatten(2))
    y = y * z / (1 + (-z).exp())
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"]
    return affine(w, "out_proj", y)


def along_channels(w: Weights, x: Tensor) -> Tensor:
    u = affine(w, "in_proj", x).transpose(1, 2)  # the channels are the steps
    q, k, v = filtered(w, "short_filter", u, causal=True).transpose(1, 2).chunk(3, -1)
    return affine(w, "out_proj", q * k * v)


def mlp(gated: bool) -> Definition:
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def reference(w: Weights, x: Tensor) -> Tensor:
        up = affine(w, "fc1", x)
        return affine(w, "fc2", gelu(affine(w, "gate", x)) * up if gated else gelu(up))

    return reference


def normed(w: Weights, x: Tensor, centred: bool, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centred else x
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w["weight"]
    return y + w["bias"] if centred else y


def other_stream(x: Tensor) -> tuple[Tensor, Tensor]:
    """The stream, and five tokens that are made of its first one."""
    own = torch.arange(1, OTHERS + 1, dtype=x.dtype).reshape(1, -1, 1)
    return x, (x[:, :1] * own / OTHERS).flip(-1)


def cross(w: Weights, x: Tensor) -> Tensor:
    k, v = affine(w, "kv_proj", other_stream(x)[1]).chunk(2, -1)
    return joined(w, scores(heads(affine(w, "q_proj", x)), heads(k)), heads(v))


def two_streams(local: bool) -> Definition:
    def reference(w: Weights, x: Tensor) -> Tensor:
        one = rows_of(w, x)
        two = rows_of(w, other_stream(x)[1], name="in_proj_2")
        q, k, v = (torch.cat(pair, 2) for pair in zip(one, two, strict=True))
        tokens = x.shape[1]
        seen = torch.ones(tokens + OTHERS, tokens + OTHERS, dtype=torch.bool)
        if local:
            seen[:tokens, :tokens] = disc(tokens)
        weight = scores(q, k) * seen
        y = (weight / weight.sum(-1, keepdim=True)) @ v
        y = torch.cat(list(y.unbind(1)), -1)
        own, other = y.split([tokens, OTHERS], 1)
        return torch.cat((affine(w, "out_proj", own), affine(w, "out_proj_2", other)), 1)

    return reference


def beside_a_grid(w: Weights, x: Tensor) -> Tensor:
    """Three tokens first that see all and are seen by all; then the grid."""
    q, k, v = rows_of(w, three_more(x))
    seen = torch.ones(x.shape[1] + 3, x.shape[1] + 3, dtype=torch.bool)
    seen[3:, 3:] = disc(x.shape[1])
    return joined(w, scores(q, k) * seen, v)


def three_more(x: Tensor) -> Tensor:
    return torch.cat((other_stream(x)[1][:, :3], x), 1)


def branches(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.cos(), 2 * x


def merged(kind: str) -> Definition:
    def reference(w: Weights, x: Tensor) -> Tensor:
        a, b = branches(x)
        if kind == "sum":
            return a + b
        if kind == "lerp":
            return (1 - w["factor"]) * a + w["factor"] * b
        u = torch.cat((a, b), -1)
        if kind == "linear":
            return affine(w, "proj", u)
        share = affine(w, "gate", u).exp()
        share = share / share.sum(-1, keepdim=True)
        return share[..., :1] * a + share[..., 1:] * b

    return reference


WINDOW = {"blocks": "blocks", "dense": "dense"}
TABLE: dict[str, tuple[Callable[[int], nn.Module], Definition]] = {
    "attention": (lambda n: Attention(DIM, HEADS), softmax(everything)),
    "attention, causal, one kv head": (lambda n: Attention(DIM, HEADS, 1, causal=True), softmax(past, 1)),
    "attention of cross_attention": (lambda n: With(CrossAttention(DIM, DIM, HEADS), other_stream), cross),
    "attention of joint_attention": (lambda n: With(JointAttention(DIM, DIM, HEADS), other_stream), two_streams(False)),
    "latent_attention": (lambda n: LatentAttention(DIM, HEADS, 3), latent),
    **{
        f"sliding_window, {form}": (
            lambda n, form=form: SlidingWindow(DIM, HEADS, 10, form=form), softmax(lambda x: away(x).abs() <= 10),
        )
        for form in ("blocks", "dense")
    },
    "sliding_window, causal, one kv head": (
        lambda n: SlidingWindow(DIM, HEADS, 20, 1, causal=True),
        softmax(lambda x: past(x) & (away(x) <= 20), 1),
    ),
    "local_attention_2d": (lambda n: LocalAttention2d(DIM, HEADS, 3, *SIDES[n], 1), softmax(lambda x: disc(x.shape[1]), 1)),
    "local_attention_2d, beside other tokens": (
        lambda n: With(LocalAttention2d(DIM, HEADS, 3, *SIDES[n], groups="text: full, image: local"),
                       lambda x: (three_more(x),)),
        beside_a_grid,
    ),
    "local_attention_2d of joint_attention": (
        lambda n: With(JointLocalAttention2d(DIM, DIM, HEADS, 3, *SIDES[n], "image, text", "text: full, image: local"),
                       other_stream),
        two_streams(True),
    ),
    **{
        f"linear_attention, {kind}{', causal' if causal else ''}": (
            lambda n, kind=kind, causal=causal: LinearAttention(DIM, HEADS, feature=kind, causal=causal),
            linear(kind, past if causal else everything),
        )
        for kind in ("elu1", "relu", "softmax_pair")
        for causal in (False, True)
    },
    "linear_window_attention": (
        lambda n: LinearWindowAttention(DIM, HEADS, 48, feature="elu1"), hybrid(48, everything),
    ),
    "linear_window_attention, causal": (
        lambda n: LinearWindowAttention(DIM, HEADS, 9, feature="elu1", causal=True), hybrid(9, past),
    ),
    "mamba2": (lambda n: Mamba2(DIM, 4, 4), mamba),
    "mamba2, both ways": (
        lambda n: Mamba2(DIM, 4, 4, causal=False), lambda w, x: mamba(w, x, ("", "_back")),
    ),
    **{
        f"{cls.__name__}, kernel {kernel}{', causal' if causal else ''}": (
            lambda n, cls=cls, kernel=kernel, causal=causal: cls(DIM, kernel, causal), hyena(causal),
        )
        for cls in (HyenaX, HyenaY, HyenaSE)
        for kernel, causal in ((4, True), (3, False), (4, False))
    },
    "HyenaX, shifts": (lambda n: HyenaX(DIM, 4, form="shifts"), hyena(True)),
    **{
        f"{cls.__name__}, kernel {kernel}, on a grid": (
            lambda n, cls=cls, kernel=kernel: cls(DIM, kernel, False, 2, 2, *SIDES[n]), hyena(False, grid=True),
        )
        for cls, kernel in ((HyenaX, 3), (HyenaY, 4), (HyenaSE, 3))
    },
    **{
        f"depthwise_conv, kernel {kernel}{', causal' if causal else ''}": (
            lambda n, kernel=kernel, causal=causal: DepthwiseConv(DIM, kernel, causal, "random"),
            lambda w, x, causal=causal: filtered(w, "filter", x, causal),
        )
        for kernel, causal in ((4, True), (7, False), (4, False))
    },
    "depthwise_conv, kernel 3, on a grid": (
        lambda n: DepthwiseConv(DIM, 3, False, "random", 2, *SIDES[n]), lambda w, x: on_grid(w, "filter", x),
    ),
    "mlp": (lambda n: Mlp(DIM, 3), mlp(False)),
    "mlp, gated": (lambda n: Mlp(DIM, 3, gated=True), mlp(True)),
    "mlp_hyena_x, kernel 4": (lambda n: MlpHyenaX(DIM, n), along_channels),
    "mlp_hyena_x, kernel 3": (lambda n: MlpHyenaX(DIM, n, kernel=3), along_channels),
    "low_rank": (lambda n: LowRank(DIM, DIM, 3), lambda w, x: affine(w, "up", affine(w, "down", x))),
    "token_linear": (lambda n: TokenLinear(DIM), lambda w, x: affine(w, "proj", x)),
    "rms_norm": (lambda n: RmsNorm(DIM), lambda w, x: normed(w, x, False, 1e-6)),
    "layer_norm": (lambda n: LayerNorm(DIM), lambda w, x: normed(w, x, True, 1e-5)),
    "identity": (lambda n: Identity(), lambda w, x: x),
    "zero": (lambda n: Zero(), lambda w, x: 0 * x),
    "merge sum": (lambda n: With(SumMerge(), branches), merged("sum")),
    "merge sum, of blocks": (
        lambda n: With(BlockSumMerge(), lambda x: (x, *branches(x))), lambda w, x: sum(branches(x)) - x,
    ),
    "merge linear": (lambda n: With(LinearMerge(DIM, 2), branches), merged("linear")),
    "merge lerp": (lambda n: With(LerpMerge(0.3), branches), merged("lerp")),
    "merge gate": (lambda n: With(GateMerge(DIM, 2), branches), merged("gate")),
}  # fmt: skip


def test_the_table_leaves_no_operator_out():
    rows = {n.partition(",")[0].replace("Hyena", "hyena_").lower() for n in TABLE}
    every = {*SPECS, *(f"{s.name} of {r}" for s in SPECS.values() for r in s.variants)}
    assert every | {f"merge {m}" for m in MERGES} == rows


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def weights_of(module: nn.Module) -> Weights:
    return {n.removeprefix("op."): p.detach().clone() for n, p in module.named_parameters()}


def made(name: str, length: int) -> nn.Module:
    torch.manual_seed(0)
    return TABLE[name][0](length).double()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TABLE)
def test_it_is_its_definition(name: str, length: int) -> None:
    module, reference = made(name, length), TABLE[name][1]
    for batch in (1, 3):
        x = torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)
        w = {n: p.requires_grad_() for n, p in weights_of(module).items()}
        found, wanted = module(x), reference(w, x)
        assert found.shape == wanted.shape
        assert relative(found, wanted) <= 1e-10 or wanted.norm() == 0 == found.norm()
        if name == "zero" or (batch, length) == (3, 1024):  # nothing flows back; and it takes long
            continue
        tangent = torch.randn_like(wanted)
        ours = torch.autograd.grad(found, [x, *module.parameters()], tangent, allow_unused=True)
        right = torch.autograd.grad(wanted, [x, *w.values()], tangent, allow_unused=True)
        for at, a, b in zip(["x", *w], ours, right, strict=True):
            a, b = (torch.zeros(1) if g is None else g for g in (a, b))
            assert relative(a, b) <= 1e-10 or (a - b).norm() <= 1e-10 * tangent.norm(), at
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        with torch.no_grad():
            low = copy.deepcopy(module).to(dtype)(x.detach().to(dtype))
            rounded = {n: p.detach().to(dtype).double() for n, p in w.items()}
            near = reference(rounded, x.detach().to(dtype).double())
        assert low.dtype == dtype
        assert relative(low, near) <= bound or near.norm() == 0 == low.norm(), dtype


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("name", TABLE)
def test_its_gradients_are_those_of_small_steps(name: str, length: int) -> None:
    """torch's `gradcheck` of the input and of every parameter."""
    module = made(name, length)
    x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


FIXED = ("grid", "2d", "mlp_hyena_x")
"""Rows that are built for one token count: nothing but their own is a right input."""


@pytest.mark.parametrize("name", TABLE)
def test_a_batch_of_none_gives_none(name: str) -> None:
    module = made(name, 7)
    one = module(torch.zeros(1, 7, DIM, dtype=torch.float64))
    assert module(torch.zeros(0, 7, DIM, dtype=torch.float64)).shape == (0, *one.shape[1:])


@pytest.mark.parametrize("name", TABLE)
def test_no_tokens_give_none_or_an_error_that_names_the_operator(name: str) -> None:
    module, nothing = made(name, 7), torch.zeros(2, 0, DIM, dtype=torch.float64)
    if any(word in name for word in FIXED):
        with pytest.raises(ValueError, match=r"0 tokens|: \d+ tokens") as caught:
            module.op(nothing, nothing) if "joint" in name else getattr(module, "op", module)(
                nothing
            )
        assert name.partition(",")[0].partition(" ")[0].replace("Hyena", "hyena_").lower() in str(
            caught.value
        )
    elif isinstance(module, With) and not isinstance(module.op, (CrossAttention, JointAttention)):
        assert module(nothing).shape == nothing.shape
    elif isinstance(module, With):
        y = module.op(nothing, torch.zeros(2, 5, DIM, dtype=torch.float64))
        assert (y[0] if isinstance(y, tuple) else y).shape == nothing.shape
    else:
        assert module(nothing).shape == nothing.shape


@pytest.mark.parametrize("name", TABLE)
def test_not_a_number_stays_one_and_stays_in_its_sample(name: str) -> None:
    """NaN in is NaN out, never hidden, and never spreads to another sample."""
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    x[0, 4] = math.nan
    y = made(name, 7)(x)
    # torch's fused attention takes a query of NaN for one that sees nothing, and gives zero.
    assert y[0].isnan().any() or name in ("zero", "attention of cross_attention")
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("form", ["blocks", "dense"])
@pytest.mark.parametrize("window", [19, 20, 50])
def test_a_window_as_long_as_the_sequence_is_all_of_it(window: int, form: str) -> None:
    op = SlidingWindow(DIM, HEADS, window, form=form).double()
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    torch.testing.assert_close(op(x), softmax(everything)(weights_of(op), x))
    hybrid_op = LinearWindowAttention(DIM, HEADS, window, feature="elu1").double()
    wanted = softmax(everything)(weights_of(hybrid_op), x)
    torch.testing.assert_close(hybrid_op(x), wanted)
