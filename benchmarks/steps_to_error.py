"""Steps of stage 1, with the defaults, to the error that random weights with AdamW reach in 400.

    python benchmarks/steps_to_error.py

Reads what `python benchmarks/first_weights.py run` measured (first_weights.json) and trains nothing.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from timing import Report

MEASURED = Path(__file__).parent / "first_weights.json"
BASE, STEPS, GOAL, AIM = "random, AdamW", 400, 100, 40
DEFAULTS = {"hyena_x": "all fitted in turn", "hyena_y": "all fitted in turn", "hyena_se": "all fitted in turn",
            "sliding_window": "reused, v and out fitted", "linear_attention": "reused, v and out fitted",
            "local_attention_2d": "reused, v and out fitted", "latent_attention": "SVD of k and v, then v and out fitted",
            "linear_window_attention": "q, k, v, out reused", "mamba2": "random, out fitted",
            "mlp": "resized, down fitted", "low_rank": "whitened SVD", "depthwise_conv": "identity", "mlp_hyena_x": "random, out fitted",
            "mlp(ratio = 6)": "resized", "attention()": "reused", "attention(kv_heads = 1)": "k and v pooled"}  # fmt: skip
"""The policy of each operator that a rule without `init` gets (multi-query attention has none: what a rule has to ask
for); its optimiser is the engine's."""
EXACT = 1e-9


def fewest(row: dict[str, Any], error: float) -> int | None:
    """The fewest steps, of either budget, after which the mean site error is at most `error`."""
    if statistics.mean(row["site_error"]["0"]) <= error:
        return 0
    return min((int(s) for trace in row["trace"].values() for s, sites in trace.items() if statistics.mean(sites) <= error), default=None)  # fmt: skip


def steps_to(row: dict[str, Any], error: float) -> str:
    """The first step at which the mean site error is at most `error`, in a run of 100 steps and in one of 400."""
    if statistics.mean(row["site_error"]["0"]) <= error:
        return "0"
    found: list[str] = []
    for budget, trace in row["trace"].items():
        steps = sorted(
            int(s) for s, sites in trace.items() if statistics.mean(sites.values() if isinstance(sites, dict) else sites) <= error
        )  # fmt: skip
        found.append(f"{steps[0]} (of {budget})" if steps else f"not in {budget}")
    return ", ".join(found) or "NOT RUN"


def measure() -> Report:
    rows: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    table: list[tuple[str, ...]] = []
    for title in dict.fromkeys(r["operator"] for r in rows.values()):
        default = DEFAULTS.get(title, DEFAULTS.get(title.partition("(")[0]))
        own, base = rows.get(f"{title} | {default}"), rows.get(f"{title} | {BASE}")
        if own is None and default is None:
            continue
        if own is None:
            table.append((title, "", "NOT RUN", "", ""))
            continue
        first = statistics.mean(own["site_error"]["0"])
        start = f"{first:.4f}"
        if first < EXACT:
            table.append((title, "not trained", "exact", "0", "reached"))
            continue
        reached = (base or {}).get("site_error", {}).get(str(STEPS))
        if reached is None:
            table.append((title, "NOT RUN", start, "", ""))
            continue
        error = statistics.mean(reached)
        need = fewest(own, error)
        state = "short" if need is None or need > GOAL else "reached" if need <= AIM else "reached, not the aim"  # fmt: skip
        table.append((title, f"{error:.4f}", start, steps_to(own, error), state))
    return Report(
        f"Steps to the error of random weights with AdamW in {STEPS}",
        ("operator", f"random, AdamW, {STEPS} steps", "the defaults before any step", "the defaults need", f"goal {GOAL}, aim {AIM}"),
        tuple(table),
        (
            f"`python benchmarks/steps_to_error.py`, from `first_weights.json`. Goal: at most {GOAL} steps, aiming at {AIM}. Mean relative error of the four sites on "
            "held-out samples, the digits teacher. 0: below it with no gradient step. NOT RUN: AdamW from random weights, or "
            "the defaults, are to be measured for this operator (`python benchmarks/first_weights.py run` goes on where it was).",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    print(measure().markdown())
