"""Why not: microseconds a node of the near misses of a dataflow rule over the whole graph, beside matching it.

    python benchmarks/whynot.py

The model is that of `matching.py`: chains of 28, 280 and 2,800 blocks of 20 ops. The rules are an attention and an MLP with
one thing wrong, so that nothing matches and every block is a near miss: the worst case.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from matching import LENGTHS, NODES, program
from timing import Report

from graftc.language.check import check
from graftc.program.flat import flatten
from graftc.rewrite.dataflow.matcher import occurrences
from graftc.rewrite.dataflow.pattern import patterns_of
from graftc.rewrite.dataflow.view import program_view
from graftc.rewrite.whynot.dataflow import dataflow_misses

GOAL = 70
RULES = {
    "attention, a scale that is not there": """
        q = transpose(reshape(linear(x, wq, bq), [b, n, h, e]), 1, 2)
        k = transpose(reshape(linear(x, wk, bk), [b, n, h, e]), 1, 2)
        v = transpose(reshape(linear(x, wv, bv), [b, n, h, e]), 1, 2)
        o = transpose(scaled_dot_product_attention(q, k, v, scale = 1.0), 1, 2)
    """,
    "MLP, another activation": "o = linear(silu(linear(x, w, b)), u, c)",
    "norm, an op that is not there": "o = linear(tanh(layer_norm(x, [d], s, t)), w, b)",
}


def best(run: Callable[[], object], repeats: int) -> float:
    """The least CPU time of a few calls: what else the machine does is not counted."""
    gc.collect()
    times: list[float] = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def measure(lengths: tuple[int, ...] = LENGTHS) -> Report:
    """All lengths; the nearest miss of each rule is found, or the run fails."""
    rows: list[tuple[str, ...]] = []
    for length in lengths:
        nodes = length * NODES
        flat = flatten(program(length))
        for name, text in RULES.items():
            rule = check(f"rule r {{\n match {{ {text} }}\n rewrite {{ o = o }}\n}}").rules[0]
            repeats = 1 if length > 1000 else 3
            (pattern,) = patterns_of(rule.matches[0], rule.edit)  # pyright: ignore[reportArgumentType]
            view = program_view(flat)
            matching = best(lambda p=pattern, v=view: list(occurrences(p, v)), repeats)
            asking = best(lambda r=rule, f=flat: dataflow_misses(r, program_view(f)), repeats)
            found = dataflow_misses(rule, view)
            said = found[0].changes[0].text if found else "none near"
            rows.append(
                (
                    f"{length:,}", f"{nodes:,}", name, f"{1e6 * matching / nodes:.2f}",
                    f"{1e6 * asking / nodes:.1f}", f"{asking / max(matching, 1e-9):,.0f}x", said,
                )
            )  # fmt: skip
    return Report(
        "Why not, in µs a node",
        ("blocks", "nodes", "rule", "matching", "near misses", "near misses / matching", "nearest"),
        tuple(rows),
        (
            f"Goal: near misses at most {GOAL} µs a node. Matching finds nothing and stops early; the near misses weigh every op of the "
            "graph against every op of the pattern. The view of the graph is made anew for the near misses, and once for matching. CPU time, the least of 3 calls (1 at 56,000 nodes).",
        ),
    )


if __name__ == "__main__":
    print(measure().markdown())
