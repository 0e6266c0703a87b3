"""Operators on a GPU against flash attention, and PixArt-Sigma at 2048 pixels; for a person who has one.

    python benchmarks/gpu.py            # the operators
    python benchmarks/gpu.py --pixart   # and PixArt-Sigma's real config (about 20 GB)

Prints Markdown for RESULTS.md: device, versions and ratios. D = 1152, 16 heads, bfloat16, forward and forward + backward, at
256, 1,024, 4,096 and 16,384 tokens, every operator under torch.compile, beside `scaled_dot_product_attention` in the flash backend.
Without a CUDA device it says NOT RUN and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import Report
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from graftc.operators.build import build
from graftc.operators.spec import OfSite
from graftc.operators.specs import SPECS

DIM, HEADS = 1152, 16
TOKENS = (256, 1024, 4096, 16384)
SITE: dict[str, Any] = {
    "dim": DIM, "heads": HEADS, "kv_heads": HEADS, "head_dim": DIM // HEADS, "causal": False, "rotary": "none",
}  # fmt: skip
OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "hyena_x, conv": ("hyena_x", {"form": "conv"}),
    "hyena_x, shifts": ("hyena_x", {"form": "shifts"}),
    "hyena_se, shifts": ("hyena_se", {"form": "shifts"}),
    "sliding_window(64), blocks": ("sliding_window", {"window": 64, "form": "blocks"}),
    "linear_attention": ("linear_attention", {}),
    "mamba2": ("mamba2", {}),
}


def make(operator: str, given: dict[str, Any]) -> nn.Module:
    """An operator at DiT-XL/2's width, bfloat16, on the device."""
    spec = SPECS[operator]
    arguments = {
        a.name: given.get(a.name, SITE.get(a.name) if isinstance(a.default, OfSite) else a.default)
        for a in spec.args
    }
    return build(spec, arguments).to("cuda", torch.bfloat16)


class FlexWindow(nn.Module):
    """The weights of a `sliding_window`, through FlexAttention: what its form on a GPU would be."""

    def __init__(self, operator: Any, tokens: int) -> None:
        super().__init__()
        self.operator = operator
        window = operator.window
        self.mask = create_block_mask(
            lambda b, h, q, k: (q - k).abs() <= window, None, None, tokens, tokens, device="cuda"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        o: Any = self.operator
        q, k, v = (
            t.unflatten(-1, (o.heads, o.head_dim)).transpose(1, 2)
            for t in o.in_proj(x).chunk(3, dim=-1)
        )
        y: Any = flex_attention(q, k, v, block_mask=self.mask)
        return o.out_proj(y.transpose(1, 2).flatten(2))


def milliseconds(run: Callable[[], Any], rounds: int = 30) -> float:
    """The median of CUDA events, after a warm-up."""
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


def both_ways(module: Any, x: torch.Tensor) -> tuple[float, float]:
    """(forward, forward + backward) in milliseconds."""
    with torch.no_grad():
        forward = milliseconds(lambda: module(x))
    trained = x.detach().requires_grad_()

    def step() -> None:
        module(trained).sum().backward()

    return forward, milliseconds(step)


def rows() -> Iterator[tuple[str, ...]]:
    for tokens in TOKENS:
        x = torch.randn(max(1, 16384 // tokens), tokens, DIM, device="cuda", dtype=torch.bfloat16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            full = both_ways(torch.compile(make("attention", {})), x)
        candidates: dict[str, nn.Module] = {n: make(*given) for n, given in OPERATORS.items()}
        window = make("sliding_window", {"window": 64})
        candidates["sliding_window(64), FlexAttention"] = FlexWindow(window, tokens)
        for name, module in candidates.items():
            torch.compiler.reset()
            own = both_ways(torch.compile(module), x)
            yield (
                name, f"{tokens:,}", f"{full[0] / own[0]:.2f}x", f"{full[1] / own[1]:.2f}x",
                f"{own[0]:.3g} ms", f"{full[0]:.3g} ms",
            )  # fmt: skip


def pixart() -> Report:
    """One forward pass at 2048 px, Hyena-X in the paper's 14 layers, compiled, against the compiled original."""
    from diffusers import PixArtTransformer2DModel

    layers = (8, 10, 12, 14, 16, 18, *range(20, 28))
    model: Any = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
        cross_attention_dim=1152, sample_size=256, patch_size=2, caption_channels=4096,
        interpolation_scale=4, use_additional_conditions=False,
    ).to("cuda", torch.bfloat16).eval()  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 256, 256, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": torch.randn(1, 300, 4096, device="cuda", dtype=torch.bfloat16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }

    def run(module: Any) -> float:
        torch.compiler.reset()
        compiled: Any = torch.compile(module)
        with torch.no_grad():
            return milliseconds(lambda: compiled(**given), rounds=10)

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
    kept = [block.attn1 for block in model.transformer_blocks]
    for i in layers:
        model.transformer_blocks[i].attn1 = Nothing()
    without = run(model)
    for i in layers:
        model.transformer_blocks[i].attn1 = InPlace(make("hyena_x", {"form": "shifts"}))
    grafted = run(model)
    for i in layers:
        model.transformer_blocks[i].attn1 = kept[i]
    share = 1 - without / original
    return Report(
        "PixArt-Sigma, 2048 px, Hyena-X in 14 of 28 layers, one forward pass, compiled",
        ("original", "grafted", "ratio", "those 14 attentions' share", "most that Amdahl allows", "of it"),
        ((f"{original:.4g} ms", f"{grafted:.4g} ms", f"{original / grafted:.3f}x", f"{share:.0%}",
          f"{original / without:.3f}x", f"{(original / grafted) / (original / without):.0%}"),),
        ("Random weights: time does not depend on them. Goal: 90 % of what Amdahl allows, and above the paper's 1.43x (H100).",),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixart", action="store_true")
    words = parser.parse_args()
    if not torch.cuda.is_available():
        print("NOT RUN: no CUDA device here")
        return
    columns = ("operator", "tokens", "forward", "forward + backward", "own", "flash attention")
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    report = Report("Operators on a GPU, bfloat16, D = 1152", columns, tuple(rows()), (about,))
    print(report.markdown())
    if words.pixart:
        print(pixart().markdown())


if __name__ == "__main__":
    main()
