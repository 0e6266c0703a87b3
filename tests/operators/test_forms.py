"""Every operator under torch.export, ONNX Runtime, torch.compile, vmap, and as copied source."""

from __future__ import annotations

import inspect
import io
import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from graftc.operators.attention import Attention, CrossAttention, LatentAttention
from graftc.operators.conv import DepthwiseConv
from graftc.operators.flex import FlexWindow
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY
from graftc.operators.linear import LowRank, TokenLinear
from graftc.operators.linear_attention import LinearAttention, LinearWindowAttention
from graftc.operators.local_2d import JointLocalAttention2d, LocalAttention2d
from graftc.operators.mamba2 import Mamba2
from graftc.operators.mlp import Mlp, MlpHyenaX
from graftc.operators.norms import LayerNorm, RmsNorm
from graftc.operators.parallel import GateMerge
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS = 8, 2
OPERATORS = {
    "attention": lambda: Attention(DIM, HEADS, 1),
    "attention causal": lambda: Attention(DIM, HEADS, causal=True),
    "sliding_window": lambda: SlidingWindow(DIM, HEADS, 4),
    "sliding_window causal": lambda: SlidingWindow(DIM, HEADS, 20, 1, causal=True),
    "sliding_window flex": lambda: FlexWindow(DIM, HEADS, 4),
    "linear_attention": lambda: LinearAttention(DIM, HEADS),
    "linear_attention causal": lambda: LinearAttention(DIM, HEADS, 1, feature="relu", causal=True),
    "hyena_x": lambda: HyenaX(DIM),
    "hyena_y": lambda: HyenaY(DIM),
    "hyena_se": lambda: HyenaSE(DIM, 5, causal=False),
    "depthwise_conv": lambda: DepthwiseConv(DIM, 7, init="random"),
    "mlp": lambda: Mlp(DIM, 3, "gelu_tanh"),
    "mlp gated": lambda: Mlp(DIM, 3, "silu", gated=True),
    "token_linear": lambda: TokenLinear(DIM),
    "attention qk_norm": lambda: Attention(DIM, HEADS, qk_norm="rms_norm"),
    "latent_attention": lambda: LatentAttention(DIM, HEADS, 3, causal=True),
    "softmax_pair": lambda: LinearAttention(DIM, HEADS, 1, feature="softmax_pair", causal=True),
    "linear_window": lambda: LinearWindowAttention(DIM, HEADS, 8, 1),
    "linear_window causal": lambda: LinearWindowAttention(DIM, HEADS, 8, causal=True),
    "mamba2": lambda: Mamba2(DIM, 4, 4, groups=2),
    "mamba2 both": lambda: Mamba2(DIM, 4, 4, causal=False),
    "hyena_se order 3": lambda: HyenaSE(DIM, order=3),
    "low_rank": lambda: LowRank(DIM, DIM, 3),
    "rms_norm": lambda: RmsNorm(DIM),
    "layer_norm": lambda: LayerNorm(DIM),
}
FIXED = {
    "local_attention_2d": lambda: LocalAttention2d(DIM, HEADS, 2, 5, 7, 1),
    "hyena_x on a grid": lambda: HyenaX(DIM, 3, causal=False, dims=2, height=5, width=7),
    "mlp_hyena_x": lambda: MlpHyenaX(DIM, 35),
}
SIZES = ((1, 1), (3, 7), (2, 64), (1, 100), (2, 130))


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {**OPERATORS, **FIXED}[name]().eval()


def _session(exported: torch.export.ExportedProgram):
    """The operator as ONNX Runtime runs it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(exported, (), dynamo=True, opset_version=20, verbose=False).save(file)
    finally:
        logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])


def _runs(session, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
    return tuple(torch.from_numpy(f) for f in found)


def _export(module: nn.Module, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = {1: torch.export.Dim("tokens")}
    if dynamic_batch:
        shapes[0] = torch.export.Dim("batch")
    example = torch.randn(2, 37, DIM)
    return torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)


@pytest.mark.parametrize("name", OPERATORS)
def test_export_and_onnx_take_any_batch_and_length(name):
    module = _made(name)
    exported = _export(module, dynamic_batch=True)
    again, session = exported.module(), _session(exported)
    for batch, tokens in SIZES:
        x = torch.randn(batch, tokens, DIM)
        with torch.no_grad():
            y = module(x)
            torch.testing.assert_close(again(x), y)
        (found,) = _runs(session, (x,))
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_length_takes_any_batch(name):
    module = _made(name)
    batch = torch.export.Dim("batch")
    x = torch.randn(2, 35, DIM)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=False)
    session = _session(exported)
    for size in (1, 3):
        x = torch.randn(size, 35, DIM)
        with torch.no_grad():
            torch.testing.assert_close(_runs(session, (x,))[0], module(x), rtol=1e-5, atol=1e-5)


KEPT = {
    "attention": lambda **k: Attention(DIM, HEADS, 1, **k),
    "attention causal": lambda **k: Attention(DIM, HEADS, causal=True, **k),
    "latent_attention": lambda **k: LatentAttention(DIM, HEADS, 3, **k),
    "sliding_window": lambda **k: SlidingWindow(DIM, HEADS, 4, **k),
    "sliding_window causal": lambda **k: SlidingWindow(DIM, HEADS, 4, causal=True, **k),
    "linear_attention": lambda **k: LinearAttention(DIM, HEADS, 1, **k),
    "linear_window causal": lambda **k: LinearWindowAttention(DIM, HEADS, 8, causal=True, **k),
}


@pytest.mark.parametrize("name", KEPT)
def test_onnx_with_a_mask_and_rotary_positions(name):
    torch.manual_seed(0)
    rotary = "half" if "causal" in name else "interleaved"
    module = KEPT[name](rotary=rotary).eval()
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")

    def given(size: int, length: int) -> tuple[torch.Tensor, ...]:
        seen = torch.rand(size, 1, 1, length) < 0.7
        seen[..., 0] = True
        if rotary == "half":  # and an additive mask
            seen = torch.zeros(size, 1, 1, length).masked_fill(~seen, -1e4)
        table = torch.randn(2, size, length, 4)
        return torch.randn(size, length, DIM), seen, table[0], table[1]

    shapes = (
        {0: batch, 1: tokens},
        {0: batch, 3: tokens},
        {0: batch, 1: tokens},
        {0: batch, 1: tokens},
    )
    exported = torch.export.export(module, given(2, 37), dynamic_shapes=shapes, strict=False)
    session = _session(exported)
    for size in ((1, 1), (3, 7), (1, 100)):
        inputs = given(*size)
        with torch.no_grad():
            torch.testing.assert_close(
                _runs(session, inputs)[0], module(*inputs), rtol=1e-4, atol=1e-5
            )


def test_onnx_of_operators_with_two_streams():
    torch.manual_seed(0)
    batch, text = torch.export.Dim("batch"), torch.export.Dim("text")
    streams = {0: batch}, {0: batch, 1: text}
    joint = JointLocalAttention2d(
        DIM, DIM, HEADS, 2, 5, 7, "image, text", "text: full, image: local"
    )
    cases = ((CrossAttention(DIM, 6, HEADS, 1), 6), (joint, DIM))
    for module, width in cases:
        example = torch.randn(2, 35, DIM), torch.randn(2, 9, width)
        exported = torch.export.export(module, example, dynamic_shapes=streams, strict=False)
        session = _session(exported)
        for size, length in ((1, 1), (3, 20)):
            given = torch.randn(size, 35, DIM), torch.randn(size, length, width)
            with torch.no_grad():
                wanted = module(*given)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            torch.testing.assert_close(_runs(session, given), wanted, rtol=1e-5, atol=1e-5)


def test_onnx_of_the_gate_merge():
    torch.manual_seed(0)
    module = GateMerge(DIM, 2)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    example = torch.randn(2, 9, DIM), torch.randn(2, 9, DIM)
    exported = torch.export.export(module, example, dynamic_shapes=((dims, dims),), strict=False)
    given = torch.randn(3, 4, DIM), torch.randn(3, 4, DIM)
    with torch.no_grad():
        torch.testing.assert_close(
            _runs(_session(exported), given)[0], module(*given), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["attention", "sliding_window", "linear_attention causal"])
def test_export_with_a_fixed_batch_still_takes_any_length(name):
    again = _export(_made(name), dynamic_batch=False).module()
    for tokens in (2, 64, 130):
        x = torch.randn(2, tokens, DIM)
        torch.testing.assert_close(again(x), _made(name)(x))


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_traces_it_whole(name):
    torch._dynamo.reset()
    module = _made(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for size in ((2, 21), (1, 70)):
        x = torch.randn(*size, DIM)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("name", OPERATORS)
def test_stacked_with_vmap(name):
    modules = [OPERATORS[name]() for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    x = torch.randn(3, 2, 21, DIM)
    run = torch.vmap(lambda p, b, x: functional_call(modules[0], (p, b), (x,)))
    y = run(parameters, buffers, x)
    y.square().sum().backward()
    for i, module in enumerate(modules):
        alone = module(x[i])
        torch.testing.assert_close(y[i], alone)
        alone.square().sum().backward()
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(
                parameters[key].grad[i], parameter.grad, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", OPERATORS)
def test_the_file_runs_with_torch_alone(name):
    """The emitter copies a class and the helpers that it names, of its file or of another operator's."""
    cls = type(_made(name))
    source = inspect.getsource(inspect.getmodule(cls))
    imported = {
        line.split()[1] for line in source.splitlines() if line.startswith(("from ", "import "))
    }
    other = {name for name in imported if name.startswith("graftc.operators.")}
    allowed = {"__future__", "torch", "math", "functools", "collections.abc", "typing"}
    assert {n for n in imported - other if not n.startswith("torch.")} <= allowed


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_device_and_state_dict(name):
    with torch.device("meta"):
        meta = OPERATORS[name]()
    assert all(p.is_meta for p in meta.parameters())
    module = _made(name)
    meta.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(1, 5, DIM)
    assert torch.equal(meta.eval()(x), module(x))
