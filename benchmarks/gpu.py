"""Operators on a GPU against flash attention, and PixArt-Sigma at 2048 pixels; for a person who has one.

    python benchmarks/gpu.py            # the operators
    python benchmarks/gpu.py --pixart   # and PixArt-Sigma's real config (about 20 GB)
    python benchmarks/gpu.py --pixart --dry-run   # the same code at tiny sizes on the CPU, uncompiled: does it run?

Prints Markdown for RESULTS.md: device, versions and ratios. D = 1152, 16 heads, bfloat16, forward and forward + backward, at
256, 1,024, 4,096 and 16,384 tokens, every operator under torch.compile, beside `scaled_dot_product_attention` in the flash backend.
Without a CUDA device it says NOT RUN and measures nothing; a dry run prints no figure.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import Report
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graftc.operators.agreement import disagreement
from graftc.operators.build import arguments_at, build
from graftc.operators.forms import missing
from graftc.operators.spec import Machine
from graftc.operators.specs import SPECS

OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "hyena_x, conv": ("hyena_x", {"form": "conv"}),
    "hyena_x, shifts": ("hyena_x", {"form": "shifts"}),
    "hyena_y, shifts": ("hyena_y", {"form": "shifts"}),
    "hyena_se, shifts": ("hyena_se", {"form": "shifts"}),
    "sliding_window(64), blocks": ("sliding_window", {"window": 64, "form": "blocks"}),
    "sliding_window(64), flex": ("sliding_window", {"window": 64, "form": "flex"}),
    "local_attention_2d(8), tiles": ("local_attention_2d", {"radius": 8, "form": "tiles"}),
    "local_attention_2d(8), flex": ("local_attention_2d", {"radius": 8, "form": "flex"}),
    "linear_attention": ("linear_attention", {}),
    "linear_attention, causal": ("linear_attention", {"causal": True, "form": "products"}),
    "linear_attention, causal, fla": ("linear_attention", {"causal": True, "form": "fla"}),
    "linear_window_attention(64)": ("linear_window_attention", {"window": 64}),
    "hyena_x, causal_conv1d": ("hyena_x", {"form": "causal_conv1d"}),
    "mamba2": ("mamba2", {"head_dim": 64, "form": "chunks"}),
    "mamba2, mamba_ssm": ("mamba2", {"head_dim": 64, "form": "mamba_ssm"}),
}


@dataclass(frozen=True)
class Setup:
    """Where and how large. `backend` of torch.compile; `figures`: whether times mean anything here."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dim: int = 1152
    heads: int = 16
    tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    samples: int = 16384
    blocks: int = 28
    pixels: int = 256
    caption: int = 4096
    backend: str = "inductor"
    figures: bool = True

    def compiled(self, module: nn.Module) -> Any:
        torch.compiler.reset()
        return torch.compile(module, backend=self.backend)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


GPU = Setup()
DRY = Setup("cpu", torch.float32, 32, 2, (16, 64), 64, 28, 8, 24, "eager", figures=False)


def site(setup: Setup, tokens: int = 0) -> dict[str, Any]:
    """The facts of an attention of the setup's width, the tokens as a square."""
    side = math.isqrt(tokens)
    return {
        "dim": setup.dim, "heads": setup.heads, "kv_heads": setup.heads, "head_dim": setup.dim // setup.heads,
        "causal": False, "rotary": "none", "grid_height": side, "grid_width": side,
    }  # fmt: skip


def make(setup: Setup, operator: str, given: dict[str, Any], tokens: int = 0) -> nn.Module:
    """An operator at the setup's width, on its device; the tokens as a square, where it wants a grid."""
    arguments = arguments_at(SPECS[operator], site(setup, tokens), given)
    return build(SPECS[operator], arguments).to(setup.device, setup.dtype)


def not_run(setup: Setup, operator: str, given: dict[str, Any]) -> str | None:
    """Why a form of an installed package is not measured: it is not there, or does not agree here."""
    spec = SPECS[operator]
    form = spec.form(given.get("form"))
    if form is None or form.package is None or not setup.figures:
        return None  # in a dry run on the CPU the operator's own form stands in
    if (package := missing(form)) is not None:
        return f"NOT RUN: {package} is not installed"
    arguments = arguments_at(spec, site(setup), given)
    why = disagreement(spec, form, arguments, Machine(setup.device, "bf16"))
    return None if why is None else f"NOT RUN: {why}"


def milliseconds(setup: Setup, run: Callable[[], Any], rounds: int = 30) -> float:
    """The median of CUDA events, after a warm-up; once by the clock in a dry run."""
    if not setup.figures:
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    for _ in range(10):
        run()
    found: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def both_ways(setup: Setup, module: Any, x: torch.Tensor) -> tuple[float, float]:
    """(forward, forward + backward) in milliseconds."""
    with torch.no_grad():
        forward = milliseconds(setup, lambda: module(x))
    trained = x.detach().requires_grad_()

    def step() -> None:
        module(trained).sum().backward()

    return forward, milliseconds(setup, step)


def rows(setup: Setup) -> Iterator[tuple[str, ...]]:
    for tokens in setup.tokens:
        x = setup.random(max(1, setup.samples // tokens), tokens, setup.dim)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            full = both_ways(setup, setup.compiled(make(setup, "attention", {})), x)
        for name, (operator, given) in OPERATORS.items():
            if (why := not_run(setup, operator, given)) is not None:
                yield name, f"{tokens:,}", why, "", "", f"{full[0]:.3g} ms"
                continue
            own = both_ways(setup, setup.compiled(make(setup, operator, given, tokens)), x)
            figures = (
                f"{full[0] / own[0]:.2f}x", f"{full[1] / own[1]:.2f}x", f"{own[0]:.3g} ms", f"{full[0]:.3g} ms",
            )  # fmt: skip
            yield (name, f"{tokens:,}", *(figures if setup.figures else ["ran"] * 4))


def pixart(setup: Setup) -> Report:
    """One forward pass at 2048 px, Hyena-X in the paper's 14 layers, compiled, against the compiled original."""
    from diffusers import PixArtTransformer2DModel

    layers = (8, 10, 12, 14, 16, 18, *range(20, 28))
    model: Any = PixArtTransformer2DModel(
        num_attention_heads=setup.heads, attention_head_dim=setup.dim // setup.heads, in_channels=4, out_channels=8,
        num_layers=setup.blocks, cross_attention_dim=setup.dim, sample_size=setup.pixels, patch_size=2,
        caption_channels=setup.caption, interpolation_scale=4, use_additional_conditions=False,
    ).to(setup.device, setup.dtype).eval()  # fmt: skip
    given = {
        "hidden_states": setup.random(1, 4, setup.pixels, setup.pixels),
        "timestep": torch.tensor([500], device=setup.device),
        "encoder_hidden_states": setup.random(1, 300, setup.caption),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }

    def run(module: Any) -> float:
        compiled = setup.compiled(module)
        with torch.no_grad():
            return milliseconds(setup, lambda: compiled(**given), rounds=10)

    class InPlace(nn.Module):
        def __init__(self, operator: nn.Module) -> None:
            super().__init__()
            self.operator = operator

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.operator(hidden_states)

    class Nothing(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros_like(hidden_states)

    original = run(model)
    for i in layers:
        model.transformer_blocks[i].attn1 = Nothing()
    without = run(model)
    for i in layers:
        model.transformer_blocks[i].attn1 = InPlace(make(setup, "hyena_x", {"form": "shifts"}))
    grafted = run(model)
    share = 1 - without / original
    found = (
        f"{original:.4g} ms", f"{grafted:.4g} ms", f"{original / grafted:.3f}x", f"{share:.0%}",
        f"{original / without:.3f}x", f"{(original / grafted) / (original / without):.0%}",
    )  # fmt: skip
    return Report(
        "PixArt-Sigma, 2048 px, Hyena-X in 14 of 28 layers, one forward pass, compiled",
        ("original", "grafted", "ratio", "those 14 attentions' share", "most that Amdahl allows", "of it"),
        (found if setup.figures else ("ran",) * 6,),
        ("Random weights: time does not depend on them. Goal: 90 % of what Amdahl allows, and above the paper's 1.43x (H100).",),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixart", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; no figures")
    words = parser.parse_args()
    setup = DRY if words.dry_run else GPU
    if setup.figures and not torch.cuda.is_available():
        print("NOT RUN: no CUDA device here")
        return
    columns = ("operator", "tokens", "forward", "forward + backward", "own", "flash attention")
    about = "Dry run on the CPU: no figures."
    if setup.figures:
        name = torch.cuda.get_device_name()
        about = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    title = f"Operators on a GPU, bfloat16, D = {setup.dim}"
    print(Report(title, columns, tuple(rows(setup)), (about,)).markdown())
    if words.pixart:
        print(pixart(setup).markdown())


if __name__ == "__main__":
    main()
