"""What to know of a run whose DATA has very few samples: it goes on, and says so."""

from __future__ import annotations

from collections.abc import Sequence

from graftc.diagnostics import Diagnostic
from graftc.distillation.data import Data


def few_samples(data: Data, batch: int) -> tuple[Diagnostic, ...]:
    """Warnings: samples that are trained on and measured on (G826), fewer of them than a batch takes (G827).

    >>> from graftc.distillation.data import open_data
    >>> [d.code for d in few_samples(open_data([{"x": 1.0}]), batch=8)]
    ['G826', 'G827']
    >>> few_samples(open_data([{"x": float(i)} for i in range(20)]), batch=8)
    ()
    """
    told: list[Diagnostic] = []
    if data.shared:
        told.append(
            Diagnostic(
                "G826",
                "DATA has a single sample: it is trained on, and errors are measured on it too",
                site="DATA",
                wanted="samples to train on, and others to measure on",
                found="1 sample",
                help="its errors say how well it is known by heart, and nothing of others: give more samples",
                severity="warning",
            )
        )
    if data.size is not None and data.size < batch:
        told.append(
            Diagnostic(
                "G827",
                f"a step takes {batch} samples, and DATA has {data.size} to train on: each is in a step several times",
                site="DATA",
                wanted=f"{batch} samples or more",
                found=str(data.size),
                help=f"their noise differs, the samples do not: give more, or a batch of {data.size}",
                severity="warning",
            )
        )
    return tuple(told)


def lines(told: Sequence[Diagnostic]) -> tuple[str, ...]:
    """Warnings as `run.yaml` keeps them."""
    return tuple(f"{d.code}: {d.message}" for d in told)
