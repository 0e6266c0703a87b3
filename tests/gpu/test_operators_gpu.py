"""On a GPU: every form against the reference, compiled too; run with `pytest -m gpu tests/gpu`.

`GRAFTC_GPU=cpu pytest -m gpu tests/gpu` runs the same tests on the CPU, to see that they are not broken themselves.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from graftc.operators.agreement import disagreement, errors
from graftc.operators.build import arguments_at, build
from graftc.operators.forms import missing
from graftc.operators.spec import Machine
from graftc.operators.specs import SPECS

DEVICE = os.environ.get("GRAFTC_GPU", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
DIM, HEADS, TOKENS = 128, 4, 256
SITE: dict[str, Any] = {
    "dim": DIM, "heads": HEADS, "kv_heads": HEADS, "head_dim": DIM // HEADS, "causal": False, "rotary": "none",
    "grid_height": 16, "grid_width": 16, "tokens": TOKENS, "hidden": 4 * DIM, "activation": "gelu", "gated": False,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("hyena_x", {"form": "conv"}),
    ("hyena_x", {"form": "shifts"}),
    ("hyena_x", {"dims": 2, "causal": False}),
    ("hyena_y", {"form": "shifts"}),
    ("hyena_se", {"form": "shifts"}),
    ("depthwise_conv", {"kernel": 7, "init": "random"}),
    ("sliding_window", {"window": 9, "form": "blocks"}),
    ("sliding_window", {"window": 9, "form": "dense"}),
    ("sliding_window", {"window": 9, "form": "flex"}),
    ("sliding_window", {"window": 150, "form": "flex", "causal": True, "kv_heads": 2, "softcap": 5.0}),
    ("local_attention_2d", {"radius": 3}),
    ("local_attention_2d", {"radius": 3, "form": "flex"}),
    ("linear_attention", {}),
    ("linear_attention", {"causal": True}),
    ("linear_window_attention", {"window": 16}),
    ("mamba2", {}),
    ("mamba2", {"causal": False}),
    ("attention", {}),
    ("attention", {"kv_heads": 1}),
    ("latent_attention", {"rank": 16}),
    ("mlp", {"ratio": 3}),
    ("mlp_hyena_x", {}),
]  # fmt: skip


def _made(operator: str, given: dict[str, Any]) -> torch.nn.Module:
    spec = SPECS[operator]
    torch.manual_seed(0)
    return build(spec, arguments_at(spec, SITE, given)).eval()


@pytest.mark.parametrize(("operator", "given"), CASES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_device_computes_what_the_cpu_does(operator, given, compiled, dtype, limit):
    module, x = _made(operator, given), torch.randn(2, TOKENS, DIM)
    with torch.no_grad():
        wanted = module.double()(x.double())
        run: Any = module.to(DEVICE, dtype)
        made = (torch.compile(run) if compiled else run)(x.to(DEVICE, dtype))
    assert (made.cpu().double() - wanted).norm() <= limit * wanted.norm()


def _gradients(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(module(x).square().mean(), list(module.parameters())))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("operator", "given"),
    [("sliding_window", {"window": 9}), ("local_attention_2d", {"radius": 3})],
)
def test_flex_has_the_gradients_and_takes_the_masks_of_the_own_form(operator, given, compiled):
    own: Any = _made(operator, given).to(DEVICE)
    flex: Any = _made(operator, {**given, "form": "flex"}).to(DEVICE)
    run = torch.compile(flex) if compiled else flex
    x = torch.randn(2, TOKENS, DIM, device=DEVICE)
    seen = torch.rand(2, 1, 1, TOKENS, device=DEVICE) > 0.3
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, device=DEVICE)
    with torch.no_grad():
        for mask in (seen, bias):
            torch.testing.assert_close(run(x, mask), own(x, mask), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(run(x), own(x), rtol=1e-2, atol=1e-3)
    for a, b in zip(_gradients(flex, x), _gradients(own, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


TF32 = 2e-3
"""The relative error that products of float32 in TF32, of 10 bits, may have."""
INSTALLED = [
    ("mamba2", "mamba_ssm", {}),
    ("mamba2", "mamba_ssm", {"causal": False, "groups": 2}),
    ("linear_attention", "fla", {"causal": True}),
    ("linear_attention", "fla", {"causal": True, "feature": "softmax_pair"}),
    ("hyena_x", "causal_conv1d", {}),
    ("hyena_se", "causal_conv1d", {"kernel": 3}),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("operator", "name", "given"), INSTALLED)
def test_an_installed_kernel_agrees(operator, name, given, dtype):
    """Forward and every gradient, against the operator's own form in float64."""
    spec = SPECS[operator]
    form = spec.form(name)
    assert form is not None
    if missing(form) is not None:
        pytest.skip(f"{missing(form)} is not installed")
    arguments = arguments_at(spec, SITE, {**given, "form": name})
    machine = Machine(DEVICE, dtype)
    why = disagreement(spec, form, arguments, machine)
    if dtype == "fp32" and why is not None and "off here" in why:
        error, _ = errors(operator, name, tuple(sorted(arguments.items())), machine)
        assert error <= TF32, why
        pytest.skip(f"in float32 {why}: it computes in TF32, and is not chosen")
    assert why is None, why


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm not installed")
def test_mamba_ssm_agrees_where_it_is_installed():
    from mamba_ssm import Mamba2  # type: ignore[import-not-found]

    ours: Any = _made("mamba2", {"head_dim": 16})
    theirs = Mamba2(DIM, d_state=64, d_conv=4, expand=2, headdim=16).to(DEVICE)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, TOKENS, DIM, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours.to(DEVICE)(x), rtol=1e-2, atol=1e-3)
