"""Every token mixer against full attention, in torch eager and in ONNX Runtime on one CPU thread, as ratios.

    python benchmarks/operators.py
    python benchmarks/operators.py --forms   # the forms of one function against each other
    python benchmarks/operators.py --bound   # mamba2's multiplications against attention's: nothing is run

Each operator is the module that a student carries, in the form that `form = auto` takes on that path.
Goals (attention's time / operator's, at 1,024 and 4,096 tokens): sliding window 1.5 and 4.6, Hyena 2.5
and 6.9, linear attention 2.3 and 7.0, chunked SSD (mamba2) 1.6 and 4.4.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Report, interleaved, median_ms, ratio
from torch import nn

from graftc.operators.build import arguments_at, build
from graftc.operators.specs import SPECS

RESULTS = Path(__file__).with_name("operators.json")
DIM, HEADS = 256, 4
TOKENS = (1024, 4096)
THREADS = 1
OPERATORS: dict[str, tuple[str, dict[str, Any], tuple[float, float] | None]] = {
    "sliding_window(window = 4)": ("sliding_window", {"window": 4}, (1.5, 4.6)),
    "sliding_window(window = 64)": ("sliding_window", {"window": 64}, (1.5, 4.6)),
    "hyena_x(kernel = 4)": ("hyena_x", {}, (2.5, 6.9)),
    "hyena_y(kernel = 4)": ("hyena_y", {}, (2.5, 6.9)),
    "hyena_se(kernel = 4)": ("hyena_se", {}, (2.5, 6.9)),
    "linear_attention(elu1)": ("linear_attention", {}, (2.3, 7.0)),
    "linear_attention(elu1, causal)": ("linear_attention", {"causal": True}, None),
    "mamba2 (one direction)": ("mamba2", {}, (1.6, 4.4)),
    "mamba2 (one direction, expand = 1)": ("mamba2", {"expand": 1}, (1.6, 4.4)),
}
SITE = {
    "dim": DIM, "heads": HEADS, "kv_heads": HEADS, "head_dim": DIM // HEADS, "causal": False, "rotary": "none",
}  # fmt: skip


def make(operator: str, given: dict[str, Any], tokens: int) -> nn.Module:
    """The operator at the benchmark's width, with its default arguments."""
    spec = SPECS[operator]
    torch.manual_seed(0)
    return build(spec, arguments_at(spec, {**SITE, "tokens": tokens}, given)).eval()


def onnx_session(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """The module in ONNX Runtime: dynamic batch, opset 20, as graftc exports."""
    import onnxruntime

    example = torch.randn(2, x.shape[1], DIM)
    exported = torch.export.export(
        module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    file = io.BytesIO()
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(exported, (), dynamo=True, opset_version=20, verbose=False).save(file)
    finally:
        logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with torch.inference_mode():
        off = (torch.from_numpy(session.run(None, {name: x.numpy()})[0]) - module(x)).abs().max()
    assert off < 1e-4, f"ONNX Runtime is {off:.1e} off"
    return partial(session.run, None, {name: x.numpy()})


def rows(rounds: int, only: str | None = None) -> Iterator[dict[str, Any]]:
    """One row for each operator and length: attention's time over the operator's, in both runtimes."""
    for tokens in TOKENS:
        x = torch.randn(1, tokens, DIM)
        full = make("attention", {}, tokens)
        session = onnx_session(full, x)
        for name, (operator, given, goal) in OPERATORS.items():
            if only and only not in name:
                continue
            module = make(operator, given, tokens)
            with torch.inference_mode():
                eager = interleaved(
                    {"full": partial(full, x), "own": partial(module, x)},
                    rounds=rounds,
                    clock=time.process_time,
                )
                exported = interleaved(
                    {"full": session, "own": onnx_session(module, x)},
                    rounds=rounds,
                    clock=time.process_time,
                )
            yield {
                "operator": name,
                "tokens": tokens,
                "eager": ratio(eager["full"], eager["own"]),
                "onnx": ratio(exported["full"], exported["own"]),
                "eager_ms": median_ms(eager["own"]),
                "onnx_ms": median_ms(exported["own"]),
                "goal": goal[TOKENS.index(tokens)] if goal else None,
            }


FORMS = (
    *(("hyena_x", {}, ("conv", "shifts"), n) for n in TOKENS),
    *(("sliding_window", {"window": w}, ("blocks", "dense"), n) for w in (4, 64) for n in (64, 128, 256, 512)),
)  # fmt: skip


def forms(rounds: int) -> Iterator[tuple[str, ...]]:
    """How many times as long the second form takes as the first, in both runtimes."""
    for operator, given, names, tokens in FORMS:
        x = torch.randn(1, tokens, DIM)
        made = {n: make(operator, {**given, "form": n}, tokens) for n in names}
        runs: list[dict[str, Callable[[], Any]]] = [
            {n: partial(m, x) for n, m in made.items()},
            {n: onnx_session(m, x) for n, m in made.items()},
        ]
        with torch.inference_mode():
            times = [interleaved(r, rounds=rounds, clock=time.process_time) for r in runs]
        first, second = names
        ratios = [f"{ratio(t[second], t[first]):.2f}x" for t in times]
        shown = "".join(f", {k} = {v}" for k, v in given.items())
        yield f"{operator}{shown}", f"{second} / {first}", f"{tokens:,}", *ratios


def bound() -> Iterator[tuple[str, ...]]:
    """Multiplications a token that attention and mamba2 spend in products: the most that equal speed allows.

    Element-wise work, which attention hardly has and a scan has much of, is not counted.
    """
    for tokens, goal in zip(TOKENS, (1.6, 4.4), strict=True):
        full = 4 * DIM * DIM + 2 * tokens * DIM
        for expand in (2, 1):
            given = arguments_at(SPECS["mamba2"], {**SITE, "tokens": tokens}, {"expand": expand})
            op: Any = build(SPECS["mamba2"], given)
            maps = sum(m.weight.numel() for m in (op.in_proj, op.out_proj))
            inside = op.chunk * (op.groups * op.state + op.inner)  # c bᵀ, and that times x
            states = 2 * op.state * op.inner  # b xᵀ, and c times the state
            chunks = -(-tokens // op.chunk)
            carry = chunks * chunks * op.state * op.inner // tokens  # the states over the chunks
            taps = op.conv1d.weight.numel()
            own = maps + inside + states + carry + taps
            yield (
                f"mamba2, expand = {expand}", f"{tokens:,}", f"{full:,}", f"{maps:,}", f"{own:,}",
                f"{full / maps:.2f}x", f"{full / own:.2f}x", f"{goal}x",
            )  # fmt: skip


def report(found: list[dict[str, Any]]) -> Report:
    """The table: rows of operators, ratios at each length."""
    lines: list[tuple[str, ...]] = []
    for row in found:
        goal = row["goal"]
        marks = [
            f"{row[k]:.2f}x" + ("" if goal is None or row[k] >= goal else " (short)")
            for k in ("eager", "onnx")
        ]
        lines.append(
            (
                row["operator"],
                f"{row['tokens']:,}",
                *marks,
                "none" if goal is None else f"{goal}x",
                row["eager_ms"],
                row["onnx_ms"],
            )
        )
    return Report(
        "Operators against full attention, forward, CPU",
        ("operator", "tokens", "torch eager", "ONNX Runtime", "goal", "eager", "ONNX Runtime"),
        tuple(lines),
        (
            f"`python benchmarks/operators.py`. Attention's time divided by the operator's, medians of rounds that take turns; width {DIM}, {HEADS} "
            f"heads, batch 1, float32, {THREADS} thread, CPU time. Full attention is `scaled_dot_product_attention` in torch, and what the exporter makes of it in "
            "ONNX Runtime. The machine was shared with other work, hence CPU time and one thread: with two, waiting for the other one would be measured.",
        ),
    )


def measure(rounds: int = 7) -> Report:
    """Measure all rows."""
    torch.set_num_threads(THREADS)
    return report(list(rows(rounds)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="operators whose name holds this")
    parser.add_argument("--forms", action="store_true")
    parser.add_argument("--bound", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(THREADS)
    if words.bound:
        columns = (
            "operator", "tokens", "attention", "its two projections", "all of it",
            "attention / projections", "attention / all", "goal",
        )  # fmt: skip
        note = f"`python benchmarks/operators.py --bound`: multiplications a token in products, width {DIM}."
        print(Report("What products allow", columns, tuple(bound()), (note,)).markdown())
        return
    if words.forms:
        columns = ("operator", "forms", "tokens", "torch eager", "ONNX Runtime")
        note = f"`python benchmarks/operators.py --forms`, time of the one over the other's, medians of {words.rounds} rounds, likewise."
        print(Report("Forms", columns, tuple(forms(words.rounds)), (note,)).markdown())
        return
    found: list[dict[str, Any]] = []
    for row in rows(words.rounds, words.only):
        found.append(row)
        print(json.dumps(row), flush=True)
        if not words.only:
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(report(found).markdown())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    main()
