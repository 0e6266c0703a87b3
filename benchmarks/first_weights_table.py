"""docs/first-weights.md from what `first_weights.py` measured; what was not measured reads NOT RUN."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from first_weights import FRECHET, PLACES

CONTROL = "token_linear() | least squares"
REFERENCE = "random, AdamW"
DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "results" / "table.json"
TEACHER, LINEAR = "teacher", "token_linear/untrained"
NOT_RUN = "NOT RUN"
FITTED = (
    "all fitted in turn",
    "reused, v and out fitted",
    "SVD of k and v, then v and out fitted",
)


def markdown(found: Mapping[str, Any]) -> str:
    """The whole page."""
    rows: Mapping[str, Any] = found["rows"]
    control = rows[CONTROL]["output_error"]["0"]["all"]
    titles = list(dict.fromkeys(r["operator"] for r in rows.values()))
    parts = [_INTRO.format(control=f"{control:.4f}", machine=found["machine"])]
    for title in titles:
        own = [r for r in rows.values() if r["operator"] == title]
        parts.append(_operator(title, own, control))
    parts += [_by_time(rows), _frechet(found)]
    return "\n\n".join(parts) + "\n"


def _operator(title: str, rows: list[Any], control: float) -> str:
    """One operator's policies, the best of the output errors at 0 steps first."""
    goal = next((_site(r, "400") for r in rows if r["policy"] == REFERENCE), None)
    lines = [
        f"### {title}",
        "",
        "| first weights | site error at 0 | output error at 0 | 100 | 400 | gap recovered at 0 | 400 | steps to random + AdamW at 400 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda r: r["output_error"]["0"]["all"]):
        errors = [row["output_error"].get(s, {}).get("all") for s in ("0", "100", "400")]
        gaps = [_share(errors[0], control), _share(errors[2], control)]
        if title.partition("(")[0] in PLACES:  # the control replaces attentions
            gaps = ["none", "none"]
        cells = [
            row["policy"] + (f" *({row['sweeps']} sweeps)*" if "sweeps" in row else ""),
            f"{_site(row, '0'):.3f}",
            *(NOT_RUN if e is None else f"{e:.4f}" for e in errors),
            *gaps,
            _steps(row, goal),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _site(row: Mapping[str, Any], steps: str) -> float | None:
    errors = row["site_error"].get(steps)
    return None if errors is None else fmean(errors)


def _share(error: float | None, control: float) -> str:
    return NOT_RUN if error is None else f"{1 - error / control:.0%}"


def _steps(row: Mapping[str, Any], goal: float | None) -> str:
    """The fewest steps, of either budget, after which the mean site error is at most `goal`."""
    if goal is None or not row["trace"]:
        return NOT_RUN if goal is None or "100" not in row["output_error"] else "none"
    start = _site(row, "0")
    if start is not None and start <= goal:
        return "0"
    reached = [
        int(step)
        for trace in row["trace"].values()
        for step, errors in trace.items()
        if fmean(errors) <= goal
    ]
    return f"{min(reached)}" if reached else "more than 400"


def _by_time(rows: Mapping[str, Any]) -> str:
    """Output errors at 0 steps by timestep, of the defaults and the control."""
    chosen = [r for r in rows.values() if r["policy"] in (*FITTED, "least squares")]
    times = [t for t in chosen[0]["output_error"]["0"] if t != "all"]
    lines = [
        "## Output error at 0 steps, by timestep",
        "",
        "| operator | " + " | ".join(f"t = {t}" for t in times) + " |",
        "|---|" + "---:|" * len(times),
    ]
    for row in chosen:
        errors = [f"{row['output_error']['0'][t]:.4f}" for t in times]
        lines.append(f"| {row['operator']} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def _frechet(found: Mapping[str, Any]) -> str:
    """Distances of the defaults, beside the control rows of the digits table."""
    table = {line["key"]: line for line in json.loads(DIGITS.read_text())["rows"]}
    teacher, linear = (fmean(table[k]["values"]) for k in (TEACHER, LINEAR))
    lines = [
        "## Fréchet distance",
        "",
        "| row | distance | seeds | gap recovered |",
        "|---|---:|---:|---:|",
        *(
            f"| {table[k]['name']} (examples/digits/results) | {_spread(table[k]['values'])} | {len(table[k]['values'])} | |"
            for k in (TEACHER, "teacher/stage 2", "removed/untrained", LINEAR)
        ),
    ]
    for steps, said in ((0, "no step"), (400, "after 400 steps of stage 1")):
        for title, policy in FRECHET:
            key = f"{title} | {policy} | {steps} | "
            values = [v for k, v in found["frechet"].items() if k.startswith(key)]
            name = f"{title}, {policy}, {said}"
            if not values:
                lines.append(f"| {name} | {NOT_RUN} | 0 | {NOT_RUN} |")
                continue
            gap = (linear - fmean(values)) / (linear - teacher)
            lines.append(f"| {name} | {_spread(values)} | {len(values)} | {gap:.0%} |")
    return "\n".join([*lines, "", f"{found.get('frechet_protocol', '')}."])


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


_INTRO = """# First weights: what was measured

A new operator need not start at random. Where it is linear in a map while all else stands still, that map can be fitted to
the teacher's activations by least squares, without a gradient: first the values, then the gates and their filters, twice over, and the
last map at the end (`init least_squares`, the default of `hyena_x`, `hyena_y`, `hyena_se`, `sliding_window`, `linear_attention`,
`local_attention_2d` and `latent_attention`; `graftc/weights/alternating.py`). The values are fitted to what the teacher's own output map would have to read.

`python benchmarks/first_weights.py run`, then `frechet`, then `table` (this page; the figures are in `benchmarks/first_weights.json`).
{machine}. On the digits teacher of `examples/digits`, the attentions of blocks 1, 3, 5 and 7 replaced, or their MLPs (`mlp`, `mlp_hyena_x`), the first linears of
these (`low_rank`), or the norms before the attentions (`rms_norm`). 512 calibration
inputs; stage 1 on 3,000 stored noised inputs, batch 64, L1, Muon unless a row says AdamW, a schedule of its own for 100 and for 400 steps.

- **Site error:** ‖student − teacher‖² / ‖teacher‖² at the site, on 128 held-out images, mean of the four.
- **Output error:** the same of the noise that the whole model predicts, all four sites replaced, the same images and noise for every row, at eight
  timesteps. Defaults are chosen by it, never by site error.
- **Gap recovered:** 1 − output error / that of the token-wise linear control ({control}); the teacher's is 0. Goals: 60 % at 0 steps, 90 % after stage 1.
- Default: 2 sweeps over 8,192 rows (`graftc/weights/alternating.py`), as in every row that does not give another number.
- NOT RUN: not measured. One training seed a row.

What it says. The goals are met where the operator can hold what the teacher does, and not where it cannot: latent attention of half the width recovers 95 %
at the start (95 % by Fréchet distance) and 99 % after 400 steps, attention in a disc of radius 3 75 % and 82 %, `linear_window_attention` 92 % and multi-query attention
from pooled keys and values 97 % after 400 steps. Hyena-X with 17 centred taps recovers 31 % with
no step and 62 % after 400 (by Fréchet distance 31 % and 75 %), a window of 4 32 % and 46 % (37 % and 54 %), linear attention with relu 28 % and 77 % (13 % and
83 %): short of 60 % and 90 %, however they start. Nearly all of the error lies at t ≤ 250.

Fitted maps start nearer than random weights are after 400 steps of AdamW, for Hyena-X with 17 taps, windows, relu attention and discs, with no gradient step.
Muon closes most of the distance between starts: after 400 steps Hyena-Y, Hyena-SE, and linear attention with elu + 1 or learned feature maps do better from
the teacher's q, k and v than from fitted ones. These are rows of one seed; the defaults are those that are best before any step, where it matters most.
`linear_window_attention` keeps the teacher's own maps: fitted ones are nearer at 0 steps and further away at 100 and 400, and at 0 steps both are behind
the control. Mamba-2 from random maps with its last one fitted is level with the control before any step. A narrower MLP is nearest with its neurons chosen by
activation and its last map fitted; chosen by magnitude and fitted, which asks for no capture of the teacher's MLP, is the default. A linear map of 62 %
of its parameters (`low_rank`) is, whitened by the inputs, at once where 400 steps of training bring the plain SVD: so that is the default. A depthwise convolution alone in the place of an attention is
worse than the token-wise control however it starts and is trained: it maps no channel onto another, and is meant for a place beside something. What is exact
(self-graft, wider MLP, a block beside its copy) starts at 0 and is not trained (`tests/weights/test_exact_start.py`). `identity` and `zero` have no weights, and the
teacher has no cross- or joint attention.

## By operator"""
