"""Every model of the matrix, and the table of what is found in each against what there is."""

from __future__ import annotations

import sys
import time
from collections import Counter

from graftc.diagnostics import GraftError
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from tests.models import diffusers_models, plain_models, transformers_models
from tests.models.case import Case

CASES = (*diffusers_models.CASES, *transformers_models.CASES, *plain_models.CASES)
ROLES = ("self_attention", "cross_attention", "joint_attention", "mlp")


def found(analysis: Analysis) -> dict[str, object]:
    """What `inspect` finds, in the terms of a Case."""
    roles = Counter(s.role for s in analysis.sites)
    counts: dict[str, object] = {r: roles[r] for r in ROLES}
    return {
        "chains": tuple(len(c) for c in analysis.chains),
        **counts,
        "gated": sum(bool(s.facts.get("gated")) for s in analysis.of_role("mlp")),
        "has": set().union(*(s.has for s in analysis.of_role("attention"))),
    }


def wanted(case: Case) -> dict[str, object]:
    return {k: getattr(case, k) for k in ("chains", *ROLES, "gated", "has")}


def main(names: list[str]) -> None:
    """Print what is found in each model, and what differs from what there is."""
    for case in CASES:
        if names and not any(n.lower() in case.name.lower() for n in names):
            continue
        start = time.process_time()
        try:
            model = case.build()
            analysis = analyse(capture(model))
        except GraftError as error:
            print(f"{case.name:32} {error}")
            continue
        got, want = found(analysis), wanted(case)
        differs = {
            k: f"{got[k]} (wanted {want[k]})"
            for k in want
            if (not want[k] <= got[k] if k == "has" else got[k] != want[k])  # type: ignore[operator]
        }
        dynamic = ",".join(analysis.program.facts.dynamic)
        print(
            f"{case.name:32} {time.process_time() - start:5.1f} s [{dynamic}] {differs or 'ok'} has={sorted(got['has'])}"
        )  # type: ignore[call-overload]
        for note in analysis.program.facts.notes:
            print("    note:", note[:160])


if __name__ == "__main__":
    main(sys.argv[1:])
