"""From two `.graft` files to distilled, exported, verified models, and a picture of what they draw.

    python examples/digits/demo.py [--quick] [--out DIR]

Everything goes through graftc's public verbs: check, plan, compile, distill, finetune, export, verify. The table at the end has the
rows of the committed one (`results/table.md`, by `table.py`) at a small protocol, which it states: its figures are noisy.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from table import GRAFTS, make_controls, make_results, show
from table_rows import MODEL, Budget, Grafted, Progress, graft
from table_score import Protocol

import graftc.verbs as verbs
from graftc.diagnostics import NotRunError


@dataclass(frozen=True)
class Size:
    """How much of everything a demo does: what it trains, what it draws, and whether controls are finetuned too."""

    budget: Budget
    protocol: Protocol
    tuned_controls: bool


# The files' own budgets are for `table.py`; these keep the demo within five minutes on two cores.
DEFAULT = Size(
    Budget(stage1=150, stage2=150, rate2=3e-4),
    Protocol(samples=500, seeds=(0,)),
    tuned_controls=False,
)
QUICK = Size(
    Budget(stage1=40, stage2=40, rate2=1e-4),
    Protocol(samples=200, seeds=(0,), steps=10),
    tuned_controls=False,
)


def run_demo(size: Size, out: Path, progress: Progress, command: str) -> bool:
    """The whole story; true if every exported file was verified."""
    title("The two edits")
    grafts: dict[str, Grafted] = {}
    passed = True
    for file in GRAFTS:
        title(file.name)
        print(file.read_text(encoding="utf-8"))
        grafts[file.name] = edit(file, out / file.stem, size.budget, progress)
        passed = ship(grafts[file.name]) and passed
    title("The table")
    print(
        "controls: the teacher given the same stage 2; the same attentions removed; replaced by a token-wise linear map\n",
        flush=True,
    )
    made = make_controls(
        grafts, out / "controls", size.budget, tuned=size.tuned_controls, progress=progress
    )
    *_, result = make_results(made, size.protocol, size.budget, progress, command)
    small = "A small protocol: the distance of so few samples is noisy and biased upwards. The full table is examples/digits/results/table.md."
    result = replace(result, notes=(small, *result.notes))
    result.write(out)
    show(result)
    return passed


def edit(file: Path, folder: Path, budget: Budget, progress: Progress) -> Grafted:
    """check, plan, compile, distill, finetune, with what each has to say."""
    from graftc.cli.render import show_plan

    rules = verbs.check(file)
    step("check", f"{file.name}: ok, {len(rules.rules)} rule{'s' * (len(rules.rules) != 1)}")
    step("plan", "what the file does to the model, before anything is changed")
    show_plan(verbs.plan(file, MODEL))
    step(
        "compile, distill, finetune",
        "the student; stage 1 on the teacher's activations; stage 2 on the task's loss",
    )
    return graft(file, folder, budget, progress=progress, tell=tell)


def tell(made: Any) -> None:
    """Print what a verb returned, as the command line does."""
    from graftc.cli.render import show_build, show_run

    (show_build if hasattr(made, "manifest") else show_run)(made)


def ship(grafted: Grafted) -> bool:
    """export and verify; false if a check failed. What cannot run here says so and fails nothing."""
    from graftc.cli.render import show_verification

    try:
        file = verbs.export(grafted.build)
        step("export", f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
        found = verbs.verify(grafted.build, onnx=file)
    except NotRunError as error:
        step("export", f"NOT RUN: {error}")
        return True
    step("verify", "the exported file against the student")
    show_verification(found)
    return found.passed


def title(text: str) -> None:
    print(f"\n━━ {text} " + "━" * max(0, 90 - len(text)), flush=True)


def step(verb: str, text: str) -> None:
    print(f"\n▸ {verb}: {text}", flush=True)


def main() -> int:
    from graftc.cli.progress import Progress as Bar

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer steps and samples: shows that the path works, not what it gives",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        help="where everything goes (default: out/demo)",
    )
    words = parser.parse_args()
    size = QUICK if words.quick else DEFAULT
    for stale in [*(words.out / file.stem for file in GRAFTS), words.out / "controls"]:
        shutil.rmtree(
            stale, ignore_errors=True
        )  # a build with runs of another student is not overwritten
    started = time.monotonic()
    with Bar() as progress:
        passed = run_demo(
            size, words.out, progress, "python examples/digits/demo.py" + " --quick" * words.quick
        )
    title(f"Done in {time.monotonic() - started:.0f} s")
    print(f"picture   {words.out / 'samples.png'}   rows are models, columns share noise and label")
    print(f"table     {words.out / 'table.md'}, table.json")
    for file in GRAFTS:
        build = words.out / file.stem
        print(
            f"build     {build}   student/model.py is the generated source; runs/ the weights of both stages; student.onnx"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
