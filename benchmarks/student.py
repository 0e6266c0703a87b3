"""The student that graftc writes against the same edit made by hand in plain PyTorch, eager and compiled.

    python benchmarks/student.py

Goal: a ratio of at most 1.02. Both have the same weights and the same outputs; the runs take turns.
"""

from __future__ import annotations

import copy
import tempfile
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


def digits_like(dim: int, depth: int, heads: int) -> graftc.Model:
    """The digits DiT (64 tokens) at another width and depth, with random weights."""
    dit: Any = Reference(f"{ROOT}/examples/digits/model.py:DiT").resolve()
    torch.manual_seed(0)
    module = dit(dim=dim, depth=depth, num_heads=heads).eval()
    inputs = {
        "x": torch.randn(8, 1, 8, 8),
        "t": torch.arange(8),
        "y": torch.arange(8),
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


def measure(rounds: int = 21) -> Report:
    """Forward passes of a batch of 8, no gradient."""
    rows: list[tuple[str, ...]] = []
    for name, shape in (("digits: 8 blocks of 64", (64, 8, 4)), ("12 blocks of 384", (384, 12, 6))):
        model = digits_like(*shape)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "hyena.graft"
            file.write_text(RULE)
            student = verbs.compile(file, model, Path(folder) / "build").student()
        hand = by_hand(model, student)
        given = dict(model.inputs)
        with torch.inference_mode():
            assert torch.allclose(student(**given), hand(**given), atol=1e-5)
            for form in ("eager", "torch.compile"):
                ours: Any = student if form == "eager" else torch.compile(student)
                theirs: Any = hand if form == "eager" else torch.compile(hand)
                times = interleaved(
                    {"ours": lambda m=ours: m(**given), "theirs": lambda m=theirs: m(**given)},
                    rounds=rounds,
                    warmup=4,
                )
                rows.append(
                    (
                        name,
                        form,
                        median_ms(times["theirs"]),
                        median_ms(times["ours"]),
                        f"{ratio(times['ours'], times['theirs']):.3f}",
                    )
                )
    return Report(
        "Student against the same edit by hand",
        ("model", "form", "by hand", "graftc's student", "ratio (goal ≤ 1.02)"),
        tuple(rows),
        (f"Median over {rounds} rounds in turns, of the ratio in a round; batch 8, 64 tokens.",),
    )


if __name__ == "__main__":
    print(measure().markdown())
