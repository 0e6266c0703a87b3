"""What an operator can hold of what the teacher does: the default start, trained twice as long as stage 1 of the table.

    python benchmarks/first_weights_ceiling.py               # what is not yet in first_weights.json
    python benchmarks/first_weights_ceiling.py --only relu   # rows whose key has that text

It stops and goes on where it was; `first_weights.py table` puts what it found on the page. A row takes
one to two minutes of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import first_weights as measured
import torch
from first_weights_cases import Case, cases

LONG = 800
"""Steps of stage 1: beside 100 and 400 they show what more still bring."""
WANTED = (
    ("hyena_x(kernel = 17, causal = false)", "all fitted in turn"),
    ("sliding_window(window = 4)", "reused, v and out fitted"),
    ("linear_attention(feature = relu)", "reused, v and out fitted"),
    ("hyena_se(kernel = 17, causal = false)", "all fitted in turn"),
    ("linear_attention(feature = elu1)", "reused, v and out fitted"),
    ("local_attention_2d(radius = 3, height = 8, width = 8)", "reused, v and out fitted"),
    ("hyena_x(kernel = 4, causal = true)", "all fitted in turn"),
    ("hyena_y(kernel = 17, causal = false)", "all fitted in turn"),
    ("linear_window_attention(window = 8)", "q, k, v, out reused"),
    ("linear_attention(feature = softmax_pair)", "reused, v and out fitted"),
    ("mamba2(head_dim = 16, causal = false)", "random, out fitted"),
)


def wanted(only: str | None) -> Iterator[Case]:
    known = {case.key: case for case in cases()}
    for title, policy in WANTED:
        case = known[f"{title} | {policy}"]
        if only is None or only in case.key:
            yield case


def ceiling(case: Case) -> None:
    began = time.process_time()
    operators = measured.start(case)
    trace = measured.train(case, operators, LONG, every=LONG // 4)
    error = measured.output_error(measured.grafted("attn", operators))
    seconds = round(time.process_time() - began, 1)
    found = measured.read()
    found.setdefault("ceiling", {})[case.key] = {
        "steps": LONG, "site_error": trace[LONG], "output_error": error, "trace": trace, "seconds": seconds,
    }  # fmt: skip
    measured.write(found)
    print(f"{case.key}: output error {error['all']:.4f}, {seconds} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", help="rows whose key has this text")
    words = parser.parse_args()
    torch.set_num_threads(1)
    for case in wanted(words.only):
        if case.key not in measured.read().get("ceiling", {}):
            ceiling(case)


if __name__ == "__main__":
    main()
