"""What inductor makes of a gated convolution: one kernel between its two products; and the GPU's benchmark on the CPU.

Slow: it compiles C++.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from graftc.operators.hyena import HyenaSE, HyenaX, HyenaY

pytestmark = pytest.mark.slow


def kernels(module: torch.nn.Module) -> int:
    """How many kernels inductor writes for a forward pass; products are calls of a library, and none of them."""
    torch._dynamo.reset()
    x = torch.randn(2, 96, 32)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        made, code = run_and_get_code(torch.compile(module.eval(), fullgraph=True), x)
        torch.testing.assert_close(made, module(x), rtol=1e-4, atol=1e-5)
    text = "\n".join(code)
    assert "convolution" not in text
    return text.count("async_compile.cpp_pybinding(") + text.count("async_compile.cpp(")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cls", [HyenaX, HyenaY, HyenaSE])
def test_a_gated_convolution_is_one_fused_kernel_after_the_projection(cls, causal):
    """Shifts, filter taps and gates, in one kernel; Hyena-SE, one convolution on another, may take two."""
    found = kernels(cls(32, causal=causal, form="shifts"))
    assert found <= (2 if cls is HyenaSE else 1)


def test_the_benchmark_for_a_gpu_runs_on_a_cpu_at_tiny_sizes():
    """Every row of operators and PixArt's; it prints no figure."""
    script = Path(__file__).parents[2] / "benchmarks/gpu.py"
    words = [sys.executable, str(script), "--pixart", "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    for name in ("sliding_window(64), flex", "mamba2, mamba_ssm", "hyena_x, causal_conv1d"):
        assert any(row.startswith(f"| {name} |") for row in rows)
    assert all("ran" in r for r in rows if "operator" not in r and "original" not in r)
