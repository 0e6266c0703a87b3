"""docs/first-weights.md from what `first_weights.py` measured; what was not measured reads NOT RUN."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from first_weights import FRECHET
from first_weights_cases import CONSTANT, PLACES, cases

CONTROL = "token_linear() | least squares"
REFERENCE = "random, AdamW"
DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "results" / "table.json"
TEACHER, LINEAR = "teacher", "token_linear/untrained"
NOT_RUN = "NOT RUN"
DEFAULTS = {
    "hyena_x(kernel = 17, causal = false)": "all fitted in turn",
    "hyena_y(kernel = 17, causal = false)": "all fitted in turn",
    "hyena_se(kernel = 17, causal = false)": "all fitted in turn",
    "hyena_x(kernel = 4, causal = true)": "all fitted in turn",
    "sliding_window(window = 4)": "reused, v and out fitted",
    "local_attention_2d(radius = 3, height = 8, width = 8)": "reused, v and out fitted",
    "linear_attention(feature = relu)": "reused, v and out fitted",
    "linear_attention(feature = elu1)": "reused, v and out fitted",
    "linear_attention(feature = softmax_pair)": "reused, v and out fitted",
    "linear_window_attention(window = 8)": "q, k, v, out reused",
    "latent_attention(rank = 32)": "SVD of k and v, then v and out fitted",
    "attention(kv_heads = 1)": "k and v pooled",
    "mamba2(head_dim = 16, causal = false)": "random, out fitted",
}
"""The policy that a rule without `init` gets; of multi-query attention, what a rule has to ask for."""
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
    said = {"longer": _longer(found, control), "sweeps": _sweeps(found)}
    parts = [_INTRO.format(control=f"{control:.4f}", machine=found["machine"], **said)]
    for title in titles:
        own = [r for r in rows.values() if r["operator"] == title]
        parts.append(_operator(title, own, control))
    parts += [_most(found, control), _tried(found, control), _by_time(rows), _frechet(found)]
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
    measured = {row["policy"] for row in rows}
    missing = [c.policy for c in cases() if c.title == title and c.policy not in measured]
    lines += [f"| {policy} |" + f" {NOT_RUN} |" * 7 for policy in missing]
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


def _longer(found: Mapping[str, Any], control: float) -> str:
    """What twice the steps still bring."""
    said: list[str] = []
    for key, long in found.get("ceiling", {}).items():
        before = 1 - found["rows"][key]["output_error"]["400"]["all"] / control
        after = 1 - long["output_error"]["all"] / control
        said.append(f"{key.partition(' | ')[0]} from {before:.0%} to {after:.0%}")
    steps = {row["steps"] for row in found.get("ceiling", {}).values()}
    return f"Trained for {', '.join(map(str, steps))} steps in place of 400, the default goes {'; '.join(said)}." if said else f"Longer training: {NOT_RUN}."  # fmt: skip


def _sweeps(found: Mapping[str, Any]) -> str:
    """What more sweeps bring, by output error."""
    said: list[str] = []
    for key, row in found.get("tried", {}).items():
        title, _, way = key.partition(" | ")
        plain = found["tried"].get(f"{title} | default")
        if plain and way.startswith("sweeps") and "," not in way:
            errors = [r["output_error"]["all"] for r in (plain, row)]
            said.append(f"{title} goes from {errors[0]:.4f} to {errors[1]:.4f} with {way[7:]}")
    return "; ".join(said) + ". " if said else ""


def _most(found: Mapping[str, Any], control: float) -> str:
    """What each operator came to at most, and how much of that its default has at 0 and 400 steps."""
    longer = {steps for row in found.get("ceiling", {}).values() for steps in [row["steps"]]}
    lines = [
        "## What an operator can hold",
        "",
        f"Gap recovered by the default, then by the default trained for {', '.join(map(str, longer)) or 'more'} steps (`benchmarks/first_weights_ceiling.py`), by the best and the worst of all",
        "starts after 400 steps of Muon, and by the best of all that was measured: the *most*. Where starts that begin far apart end at the same place, and twice the steps hardly move it,",
        "the operator is at its limit, and no first weights bring more.",
        "",
        "| operator | default at 0 | at 400 | longer | best start at 400 | worst start at 400 | most | default at 0, of the most | at 400, of the most | 60 % at 0 | 90 % after stage 1 |",
        "|---|" + "---:|" * 8 + "---|---|",
    ]
    for title, policy in DEFAULTS.items():
        own = [r for r in found["rows"].values() if r["operator"] == title]
        default = found["rows"].get(f"{title} | {policy}")
        if default is None or title.partition("(")[0] in PLACES:
            continue
        at = {s: [r["output_error"][s]["all"] for r in own if s in r["output_error"] and r["optimiser"] == "muon"] for s in ("0", "100", "400")}  # fmt: skip
        long = found.get("ceiling", {}).get(f"{title} | {policy}")
        longest = [] if long is None else [long["output_error"]["all"]]
        most = 1 - min(at["0"] + at["100"] + at["400"] + longest) / control
        gaps = [1 - default["output_error"][s]["all"] / control for s in ("0", "400")]
        lines.append(
            "| "
            + " | ".join(
                [
                    f"{title}, {policy}",
                    *(f"{g:.0%}" for g in gaps),
                    f"{1 - longest[0] / control:.0%}" if longest else NOT_RUN,
                    f"{1 - min(at['400']) / control:.0%}",
                    f"{1 - max(at['400']) / control:.0%}" if len(at["400"]) > 1 else "one start",
                    f"{most:.0%}",
                    *(f"{max(0.0, g) / most:.0%}" if most > 0 else "none" for g in gaps),
                    "reached" if gaps[0] >= 0.6 else "not reached",
                    "reached" if gaps[1] >= 0.9 else "not reached",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def _tried(found: Mapping[str, Any], control: float) -> str:
    """Other ways to fit first weights, by the output error before any step."""
    rows = found.get("tried", {})
    titles = list(dict.fromkeys(k.partition(" | ")[0] for k in rows))
    ways = list(dict.fromkeys(k.partition(" | ")[2] for k in rows))
    lines = [
        "## Other ways to fit, with no step",
        "",
        "`python benchmarks/first_weights_tried.py` (its first lines say what each is). Output error at 0 steps, and the gap recovered. Other calibration noise than above: by it alone the default of",
        "`sliding_window` goes from 0.0226 to 0.0231, so differences of 0.0005 say nothing.",
        "",
        "| fitted | " + " | ".join(titles) + " |",
        "|---|" + "---:|" * len(titles),
    ]
    for way in ways:
        errors = [rows.get(f"{t} | {way}", {}).get("output_error", {}).get("all") for t in titles]
        cells = (NOT_RUN if e is None else f"{e:.4f}, {1 - e / control:.0%}" for e in errors)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    constant = [v for k, v in found["frechet"].items() if k.startswith(f"{CONSTANT.key} | ")]
    drawn = _spread(constant) if constant else NOT_RUN
    lines.append(
        f"| each site gives its mean by token, whatever it reads | {drawn} | {len(constant)} | |"
    )
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

What it says. 60 % with no step is reached by latent attention of half the width (95 %, and 95 % by Fréchet distance) and by attention in a disc of radius 3 (75 %), and by
no other operator here but what is exact. 90 % after stage 1 is reached by latent attention (99 %), multi-query attention from pooled keys and values (97 %) and `linear_window_attention` (92 %), and by no
other: Hyena-X with 17 centred taps recovers 31 % with no step and 63 % after 400 (by Fréchet distance 31 % and 75 %), a window of 4 32 % and 46 % (37 % and 54 %), linear
attention with relu 28 % and 77 % (13 % and 83 %). "What an operator can hold" below tells how much of that is the operator: a window of 4 ends at 45 to 46 % and a disc at 80 to 82 %
from every start, random ones too, so that is what they can hold as stage 1 trains them, site by site, and no first weights bring more; Hyena-X ends at 57 to 63 % from all starts but the one
without its gates. {longer} So a window is at its limit as stage 1 trains it; Hyena-X gains a point by twice the steps, though its starts do not all end at one place; linear attention
gains more, and its last points cost steps.
Of the most that was measured by any start and any number of steps, the default has with no step 96 % (latent attention), 91 % (disc), 68 % (window), half (Hyena-X, Hyena-Y and Hyena-SE with 17
taps), 36 % (relu) and 21 % (elu + 1), and after 400 steps 95 to 100 %, but 89 % with elu + 1. Nearly all of the error lies at t ≤ 250.

Other ways to fit were tried, at 0 steps ("Other ways to fit"), and the default stays. Tokens weighted by how much the model's output feels the site gain 0.0003 to 0.0009 on three operators, which
is hardly more than other noise in the calibration inputs does, and lose on Hyena-X; each site fitted on what the student before it gives gains a little on windows and loses on relu and
Hyena-X; making up for the stream's difference too gains on windows and loses much on Hyena-X; fitting the last map again after each sweep gains 0.0006 to 0.0010 on relu attention,
nothing on the window, and loses much on Hyena-X. Weights by the gate or for early timesteps (tried on the window alone), another ridge (on Hyena-X alone) and three times the samples (on
three operators) move nothing beyond that noise. What helps are more sweeps, where there are several maps to go over: {sweeps}The default stays at 2: two more
take as long as about a hundred steps of Muon, which bring more (0.0150 on Hyena-X).

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
