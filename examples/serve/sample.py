#!/usr/bin/env python3
"""Draw digits with an exported model, ONNX Runtime and NumPy alone: no torch, no graftc.

python examples/serve/sample.py out/export/model.onnx --label 7 --count 4 --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy
import onnxruntime

STEPS, NO_LABEL = 1000, 10
BARS = numpy.cumprod(
    1 - numpy.linspace(1e-4, 0.015, STEPS)
)  # the schedule that the digits' teacher was trained on


def load(path: Path | str) -> Any:
    """A session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sample(session: Any, labels: Any, *, noise: Any, steps: int = 25, guidance: float = 1.0) -> Any:
    """DDIM (Song et al. 2020, eq. 12) from noise [B, 1, 8, 8] to images [B, 1, 8, 8] in [-1, 1]; labels [B] int64."""
    kept = (
        [round(i * (STEPS - 1) / max(steps - 1, 1)) for i in range(steps)]
        if steps > 1
        else [STEPS - 1]
    )
    x, labels = noise.astype(numpy.float32), labels.astype(numpy.int64)
    for at in reversed(range(len(kept))):
        t, bar = kept[at], BARS[kept[at]]
        before = BARS[kept[at - 1]] if at else 1.0
        guess = predict(session, x, t, labels)
        if guidance != 1.0:
            free = predict(session, x, t, numpy.full_like(labels, NO_LABEL))
            guess = free + guidance * (guess - free)
        clean = numpy.clip((x - (1 - bar) ** 0.5 * guess) / bar**0.5, -1, 1)
        guess = (x - bar**0.5 * clean) / (1 - bar) ** 0.5
        x = (before**0.5 * clean + (1 - before) ** 0.5 * guess).astype(numpy.float32)
    return x


def predict(session: Any, x: Any, t: int, labels: Any) -> Any:
    """The noise that the model sees in x at timestep t: the first channel of its output."""
    inputs = {"x": x, "t": numpy.full(len(x), t, numpy.int64), "y": labels}
    return session.run(None, inputs)[0][:, :1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--label", type=int, default=7, choices=range(10))
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    noise = numpy.random.default_rng(given.seed).standard_normal((given.count, 1, 8, 8))
    for image in sample(
        load(given.model), numpy.full(given.count, given.label), noise=noise, guidance=2.0
    )[:, 0]:
        print(
            "\n".join(
                "".join(" .:-=+*#%@"[int((v + 1) * 4.999)] * 2 for v in row) for row in image
            ),
            "\n",
        )


if __name__ == "__main__":
    main()
