"""What `graftc test` says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftc.diagnostics import render, to_json

if TYPE_CHECKING:
    from graftc.rewrite.filetest import TestResult


def show_results(results: Sequence[TestResult]) -> None:
    """A line for each test with what was found true; problems go to standard error."""
    for result in results:
        verdict = "PASS" if result.passed else "FAIL"
        print(f"{verdict} {result.file}: {result.name} of {result.rule}")
        for line in result.checks:
            print(f"     {line}")
        for problem in result.problems:
            print(render(problem), file=sys.stderr)
    failed = sum(not r.passed for r in results)
    print(f"{len(results) - failed} passed, {failed} failed")


def results_dict(results: Sequence[TestResult]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "diagnostics": [to_json(p) for r in results for p in r.problems],
        "tests": [
            {
                "file": r.file,
                "test": r.name,
                "rule": r.rule,
                "passed": r.passed,
                "matches": r.matches,
                "checks": list(r.checks),
                "diagnostics": [to_json(p) for p in r.problems],
            }
            for r in results
        ],
    }
