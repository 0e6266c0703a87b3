"""Every operator under torch.export, ONNX Runtime, torch.compile, vmap, and as copied source."""

from __future__ import annotations

import inspect
import io
import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from graftc.operators.attention import Attention
from graftc.operators.conv import DepthwiseConv
from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY
from graftc.operators.linear import TokenLinear
from graftc.operators.linear_attention import LinearAttention
from graftc.operators.mlp import Mlp
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS = 8, 2
OPERATORS = {
    "attention": lambda: Attention(DIM, HEADS, 1),
    "attention causal": lambda: Attention(DIM, HEADS, causal=True),
    "sliding_window": lambda: SlidingWindow(DIM, HEADS, 4),
    "sliding_window causal": lambda: SlidingWindow(DIM, HEADS, 20, 1, causal=True),
    "linear_attention": lambda: LinearAttention(DIM, HEADS),
    "linear_attention causal": lambda: LinearAttention(DIM, HEADS, 1, feature="relu", causal=True),
    "hyena_x": lambda: HyenaX(DIM),
    "hyena_y": lambda: HyenaY(DIM),
    "hyena_se": lambda: HyenaSE(DIM, 5, causal=False),
    "depthwise_conv": lambda: DepthwiseConv(DIM, 7, init="random"),
    "mlp": lambda: Mlp(DIM, 3, "gelu_tanh"),
    "mlp gated": lambda: Mlp(DIM, 3, "silu", gated=True),
    "token_linear": lambda: TokenLinear(DIM),
}
SIZES = ((1, 1), (3, 7), (2, 64), (1, 100), (2, 130))


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return OPERATORS[name]().eval()


def _export(module: nn.Module, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = {1: torch.export.Dim("tokens")}
    if dynamic_batch:
        shapes[0] = torch.export.Dim("batch")
    example = torch.randn(2, 37, DIM)
    return torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)


@pytest.mark.parametrize("name", OPERATORS)
def test_export_and_onnx_take_any_batch_and_length(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = _made(name)
    exported = _export(module, dynamic_batch=True)
    again = exported.module()
    file = io.BytesIO()
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(exported, (), dynamo=True, opset_version=20, verbose=False).save(file)
    finally:
        logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    for batch, tokens in SIZES:
        x = torch.randn(batch, tokens, DIM)
        with torch.no_grad():
            y = module(x)
            torch.testing.assert_close(again(x), y)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-5, atol=1e-5)


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
    assert imported - other <= {"__future__", "torch", "torch.nn.functional", "math"}


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_device_and_state_dict(name):
    with torch.device("meta"):
        meta = OPERATORS[name]()
    assert all(p.is_meta for p in meta.parameters())
    module = _made(name)
    meta.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(1, 5, DIM)
    assert torch.equal(meta.eval()(x), module(x))
