"""The digits table: what each graft costs in quality, and what it took to get there.

    python examples/digits/table.py --out examples/digits/results

runs the full protocol (2,000 samples x 3 seeds) and writes `table.md`, `table.json` and `samples.png`. About half an hour on one
quiet core. `demo.py` calls the same functions with a small protocol.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from frechet import grid_png, real_against_real
from model import task
from table_rows import (
    DATA,
    FORMULAS,
    HERE,
    MODEL,
    Budget,
    Grafted,
    Progress,
    Row,
    graft,
    pretraining_flops,
    teacher_finetuned,
    teacher_row,
)
from table_score import Drawn, Protocol, score_seed
from table_text import COLUMNS, Line, cells, distance_text, markdown, plain
from torch import Tensor
from train import held_out_loss

FULL = Protocol(samples=2000, seeds=(0, 1, 2))
GRAFTS = (HERE / "hyena.graft", HERE / "hyena_and_pairs.graft")
CONTROLS = (
    (HERE / "controls" / "removed.graft", "same attentions removed"),
    (HERE / "controls" / "token_linear.graft", "token-wise linear, least squares"),
)
Scores = dict[str, list[Drawn]]


@dataclass(frozen=True, eq=False)
class Made:
    """All models of the table, in its order, and the grafts by file name."""

    rows: tuple[Row, ...]
    grafts: dict[str, Grafted]


@dataclass(frozen=True, eq=False)
class Result:
    """The finished table: its lines, what is said under them, and the picture's images by row."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    images: dict[str, Tensor]
    about: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `table.md`, `table.json` and `samples.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(markdown(self.lines, self.notes), encoding="utf-8")
        data = json.dumps(plain(self.lines, self.about), indent=1, ensure_ascii=False)
        (folder / "table.json").write_text(data + "\n", encoding="utf-8")
        distances = {line.name: distance_text(line.mean, line.deviation) for line in self.lines}
        grid_png(
            self.images,
            folder / "samples.png",
            beside=distances,
            title="Rows are models, a column shares noise and label; at the right, the Fréchet distance",
        )


def make_controls(
    grafts: dict[str, Grafted],
    folder: Path,
    budget: Budget,
    *,
    tuned: bool,
    progress: Progress | None,
) -> Made:
    """The rows of the table around `grafts`: the teacher twice, and the controls; these with stage 2 too if `tuned`."""
    first = next(iter(grafts.values())).build
    rows = [teacher_row(), teacher_finetuned(first, budget, progress)]
    stages = ("stage 2",) if tuned else ()
    for file, name in CONTROLS:
        made = graft(
            file, folder / file.stem, budget, control=name, stages=stages, progress=progress
        )
        rows += made.rows
    return Made((*rows, *(row for made in grafts.values() for row in made.rows)), grafts)


def score_rows(
    rows: Sequence[Row], protocol: Protocol, progress: Progress, *, compiled: bool
) -> Iterator[Scores]:
    """Every row scored, one seed after the other, by its key: what is known after each seed."""
    models = {
        row.key: torch.compile(row.model, dynamic=False) if compiled else row.model for row in rows
    }
    found: Scores = {row.key: [] for row in rows}
    for number, seed in enumerate(protocol.seeds):
        for count, row in enumerate(rows, 1):
            found[row.key].append(score_seed(models[row.key], task(), protocol, seed))
            progress("score", number * len(rows) + count, len(rows) * len(protocol.seeds), {})
        yield found


def make_results(
    made: Made,
    protocol: Protocol,
    budget: Budget,
    progress: Progress,
    command: str,
    *,
    compiled: bool = False,
) -> Iterator[Result]:
    """Score all rows and put the table together: one table after each seed, the last one being the whole."""
    pretraining = pretraining_flops(made.rows[0].flops)
    losses = {row.key: held_out_loss(row.model) for row in made.rows}
    real = real_against_real()
    for scores in score_rows(made.rows, protocol, progress, compiled=compiled):
        seeds = len(scores["teacher"])
        said = str(replace(protocol, seeds=protocol.seeds[:seeds]))
        lines = [Line("real", "real against real (halves)", real.values)]
        for row in made.rows:
            drawn = scores[row.key]
            lines.append(
                Line(
                    row.key,
                    row.name,
                    values=tuple(d.distance for d in drawn),
                    read_as_asked=sum(d.read_as_asked for d in drawn) / seeds,
                    held_out_loss=losses[row.key],
                    compute=row.compute / pretraining,
                    parameters=row.parameters,
                    flops=row.flops,
                )
            )
        about = {
            "command": command,
            "protocol": said,
            "training": _training(made, budget),
            "pretraining_flops": pretraining,
            "formulas": FORMULAS,
            "teacher_in_halves": [d.same_size for d in scores["teacher"]],
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        }
        images = {
            "real": _real_images(),
            **{row.name: scores[row.key][0].images for row in made.rows},
        }
        yield Result(tuple(lines), _notes(about), images, about)


def _notes(about: dict[str, Any]) -> tuple[str, ...]:
    small = Line("", "", tuple(about["teacher_in_halves"]))
    return (
        f"`{about['command']}` · {about['machine']}",
        f"**Distance:** {about['protocol']}; mean ± standard deviation over the seeds, lower is better. It is biased upwards, the more so "
        "the smaller the sets, and real against real compares halves (898 and 899): that row is no floor for the others. With at most 898 "
        f"samples against such a half the teacher has {distance_text(small.mean, small.deviation)}.",
        "**Read as asked:** samples that the classifier reads as the label they were drawn for. **Held-out loss:** the task's own, on the "
        "297 digits that nothing was trained on, four draws of noise each, the same for every row.",
        f"**Training:** {about['training']} One training seed a row: differences between rows hold training noise that ± does not show.",
        "**Compute:** "
        + about["formulas"].replace("\n", " ")
        + f" Pretraining is {about['pretraining_flops']:.3g} FLOPs.",
    )


def _training(made: Made, budget: Budget) -> str:
    """The steps of both stages, as they were run."""
    said: list[str] = []
    for name, grafted in made.grafts.items():
        stage2 = grafted.build.targets["stage2"]
        asked = sorted({s["budget"]["steps"] for s in grafted.build.targets["sites"]})
        steps = "/".join(map(str, [budget.stage1] if budget.stage1 else asked))
        rate = f" at rate {budget.rate2:g}, below the file's" if budget.rate2 else ""
        said.append(
            f"{name}: {steps} steps of stage 1 (each site), {budget.stage2 or stage2['steps']} of stage 2{rate}, batch {stage2['batch']}."
        )
    return " ".join(said)


def _real_images() -> Tensor:
    """Real digits in the order of the labels that rows are drawn for."""
    from data import Digits

    batch = Digits("all").batch()
    found: list[Tensor] = []
    for column in range(20):
        found.append(batch["latent"][batch["label"] == column % 10][column // 10])
    return torch.stack(found)


def show(result: Result) -> None:
    """Print the table and its notes."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if Console().is_terminal else Console(width=160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in result.lines:
        table.add_row(*cells(line))
    console.print(table)
    for note in result.notes:
        console.print("\n" + note.replace("**", "").replace("`", ""), highlight=False)


def main() -> None:
    from graftc.cli.progress import Progress as Bar

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="where the table and the picture go"
    )
    parser.add_argument(
        "--builds", type=Path, help="keep the builds here (default: a temporary folder)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="draw through torch.compile: a third faster where a C++ compiler is",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, Bar() as progress:
        folder = words.builds or Path(temporary)
        print(f"model {MODEL}\ndata  {DATA}\n{FULL}", flush=True)
        grafts = {
            file.name: graft(file, folder / file.stem, Budget(), progress=progress)
            for file in GRAFTS
        }
        made = make_controls(grafts, folder, Budget(), tuned=True, progress=progress)
        results = make_results(
            made,
            FULL,
            Budget(),
            progress,
            "python examples/digits/table.py",
            compiled=words.compile,
        )
        for (
            result
        ) in results:  # after every seed: a run that is stopped leaves the seeds that it finished
            result.write(words.out)
            show(result)
    print(f"\n{time.monotonic() - started:.0f} s; written to {words.out}")


if __name__ == "__main__":
    main()
