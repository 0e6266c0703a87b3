"""Run every benchmark and write RESULTS.md: ratios within one run, since machines differ and are shared.

python benchmarks/run.py
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import check
import dataflow
import matching
import memory
import operators
import overhead
import stage1
import steps_to_error
import student
import torch
import whynot

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    words = parser.parse_args()
    reports = [
        student.measure(),
        matching.measure(),
        dataflow.measure(),
        whynot.measure(),
        check.measure(),
        stage1.measure(),
        overhead.measure(),
        steps_to_error.measure(),
        memory.measure(),
        operators.measure(),
    ]
    head = (
        "# Benchmarks\n\n`python benchmarks/run.py` writes this file whole; a section that was measured alone names its command. "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        "Only ratios within one run are worth comparing.\n\nOn a GPU: NOT RUN (no device at hand).\n"
    )
    text = "\n\n".join([head, *(r.markdown() for r in reports)])
    words.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # dataflow.py keeps graphs that take minutes to take apart
