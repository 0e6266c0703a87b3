"""The student that graftc writes against the same edit made by hand in plain PyTorch, eager and compiled.

    python benchmarks/student.py

Goal: a ratio of at most 1.02. Both have the same weights and the same outputs; the runs take turns.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Report, interleaved, median_ms, ratio

import graftc
import graftc.verbs as verbs
from graftc.operators.hyena import HyenaX
from graftc.program.model import Reference

ROOT = Path(__file__).parents[1]
RULE = """
rule hyena {
    match   a = self_attention in blocks odd
    replace a with hyena_x(kernel = 4)
    distill l1
}
"""


CASES = {
    "digits (8 blocks, width 64, 64 tokens), batch 8": {"dim": 64, "depth": 8, "num_heads": 4},
    "12 blocks, width 384, 256 tokens, batch 2": {
        "dim": 384,
        "depth": 12,
        "num_heads": 6,
        "size": 16,
    },
}


def make_model(shape: dict[str, int]) -> graftc.Model:
    """A DiT of the digits example's kind with random weights, none of them zero as adaLN-zero has them."""
    dit: Any = Reference(f"{ROOT}/examples/digits/model.py:DiT").resolve()
    torch.manual_seed(0)
    module = dit(**shape).eval()
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    batch, size = (8, 8) if "size" not in shape else (2, shape["size"])
    inputs = {
        "x": torch.randn(batch, 1, size, size),
        "t": torch.arange(batch),
        "y": torch.arange(batch),
    }
    return graftc.Model(module, inputs)


def by_hand(model: graftc.Model, student: torch.nn.Module) -> torch.nn.Module:
    """The edit as its user would write it: swap the modules, copy the student's weights."""
    edited: Any = copy.deepcopy(model.module)
    for index in range(1, len(edited.blocks), 2):
        dim = edited.blocks[index].attn.proj.in_features
        edited.blocks[index].attn = HyenaX(dim=dim, kernel=4)
    edited.load_state_dict(student.state_dict(), strict=False)
    return edited.eval()


def measure(rounds: int = 25) -> Report:
    """Forward passes without gradient, in turns."""
    rows: list[tuple[str, ...]] = []
    for name, shape in CASES.items():
        model = make_model(shape)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "hyena.graft"
            file.write_text(RULE)
            student = verbs.compile(file, model, Path(folder) / "build").student().eval()
        hand = by_hand(model, student)
        rows += [(name, *measured) for measured in compare(student, hand, model.inputs, rounds)]
    return Report(
        "Student against the same edit by hand",
        ("model", "form", "by hand", "graftc's student", "ratio (goal ≤ 1.02)", "middle half"),
        tuple(rows),
        (
            f"Hyena-X in every other block. Medians over {rounds} rounds of three forward passes, the two taking turns; the ratio is the "
            "median of the rounds' ratios, and beside it stands the range of the middle half of them.",
        ),
    )  # fmt: skip


def compare(
    student: torch.nn.Module, hand: torch.nn.Module, inputs: Mapping[str, Any], rounds: int
) -> Iterator[tuple[str, ...]]:
    """Both in eager mode and under torch.compile: (form, by hand, student, ratio, range of its middle half)."""
    with torch.inference_mode():
        difference = (student(**inputs) - hand(**inputs)).abs().max() / hand(**inputs).abs().max()
        assert difference < 1e-5, f"not the same edit: {difference:.1e} off"
        for form in ("eager", "torch.compile"):
            pair: list[Any] = [hand, student]
            if form == "torch.compile":
                torch.compiler.reset()
                pair = [torch.compile(m) for m in pair]
            times = interleaved(
                {
                    n: partial(_calls, m, inputs)
                    for n, m in zip(("hand", "ours"), pair, strict=True)
                },
                rounds=rounds,
                warmup=4,
            )
            ratios = sorted(a / b for a, b in zip(times["ours"], times["hand"], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            yield (
                form,
                median_ms(times["hand"]),
                median_ms(times["ours"]),
                f"{ratio(times['ours'], times['hand']):.3f}",
                f"{low:.3f} to {high:.3f}",
            )


def _calls(model: Any, inputs: Mapping[str, Any]) -> None:
    for _ in range(3):
        model(**inputs)


if __name__ == "__main__":
    print(measure().markdown())
