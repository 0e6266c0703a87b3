"""On a GPU: every form against the reference, compiled too; run with `pytest -m gpu tests/gpu`.

`GRAFTC_GPU=cpu pytest -m gpu tests/gpu` runs the same tests on the CPU, to see that they are not broken themselves.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from graftc.operators.build import arguments_at, build
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
    ("local_attention_2d", {"radius": 3}),
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
]


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


def test_flex_attention_is_the_sliding_window():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    module: Any = _made("sliding_window", {"window": 9}).to(DEVICE)
    x = torch.randn(2, TOKENS, DIM, device=DEVICE)
    mask = create_block_mask(
        lambda b, h, q, k: (q - k).abs() <= 9, None, None, TOKENS, TOKENS, device=DEVICE
    )
    with torch.no_grad():
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in module.in_proj(x).chunk(3, dim=-1)
        )
        made: Any = torch.compile(flex_attention)(q, k, v, block_mask=mask)
        torch.testing.assert_close(
            module.out_proj(made.transpose(1, 2).flatten(2)), module(x), rtol=1e-2, atol=1e-3
        )


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm not installed")
def test_mamba_ssm_agrees_where_it_is_installed():
    from mamba_ssm import Mamba2  # type: ignore[import-not-found]

    ours: Any = _made("mamba2", {"head_dim": 16})
    theirs = Mamba2(DIM, d_state=64, d_conv=4, expand=2, headdim=16).to(DEVICE)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, TOKENS, DIM, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours.to(DEVICE)(x), rtol=1e-2, atol=1e-3)
