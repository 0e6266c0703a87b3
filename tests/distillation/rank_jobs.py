"""What the processes of a job run: `python -m tests.distillation.rank_jobs N FOLDER JOB …`.

Each job is a function of a folder. A test runs it in N processes and alone, and compares what the two left.
The processes are forks of this one, which has imported all and computed nothing, with torchrun's variables;
under torchrun itself (N is 0) they are torchrun's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  as optimisers do: not in every fork
from torch import Tensor, nn

from graftc.diagnostics import GraftError
from graftc.distillation import distill, finetune, runs
from graftc.distillation.pieces import in_pieces
from graftc.distillation.ranks import joined
from graftc.distillation.targets import Budget, Loss, Stage2
from tests.distillation import tiny

STEPS = 20


class Wide(tiny.Denoise):
    """Everything in float64."""

    def prepare(self, sample: Any, generator: torch.Generator) -> tiny.Made:
        made = super().prepare({"latent": sample["latent"].double()}, generator)
        return made

    time_range = (0.0, 1000.0)


def double(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().double()


SITES = (
    tiny.attention_site(1, solve=True, budget=Budget(steps=STEPS)),
    tiny.attention_site(
        2,
        loss=Loss("huber", mask_above=1.5),
        budget=Budget(steps=STEPS, patience=2),
        student_inputs=(0.0, 1.0),
    ),
    tiny.pair_site(after=("blocks.2.attn",), budget=Budget(steps=STEPS)),
)


def build(folder: Path, **changes: Any) -> tiny.FakeBuild:
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "make_student": double(lambda: tiny.paired((1, 2))),
        "make_teacher": double(tiny.teacher),
        **changes,
    }
    sites, stage2 = given.pop("sites", SITES), given.pop("stage2", None)
    return tiny.FakeBuild(folder, tiny.targets(*sites, stage2=stage2), **given)


def latents(count: int = 43) -> list[dict[str, Tensor]]:
    return tiny.latents(count)


ALWAYS: dict[str, Any] = {"batch": 10, "threads": 1, "stacked": "never"}


def data(folder: Path) -> None:
    distill(build(folder), latents(), Wide(), **ALWAYS)


def replay(folder: Path) -> None:
    distill(build(folder), latents(), Wide(), reuse=4, **ALWAYS)


def teacher_pieces(folder: Path) -> None:
    distill(build(folder), latents(), Wide(), shard_teacher=True, **ALWAYS)


def held(folder: Path) -> None:
    """How many bytes of a teacher in pieces this process has."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = double(tiny.teacher)()
    sizes = {name: p.nbytes for name, p in whole.named_parameters()}
    with joined() as ranks:
        pieces = in_pieces(whole, ranks, [s.teacher for s in SITES], frozen=True)
    told = {"pieces": sum(pieces.parameters[name].nbytes for name in pieces.rows),
            "divided": sum(sizes[name] for name in pieces.rows),
            "left whole": sum(sizes[name] for name in sizes.keys() - pieces.rows.keys())}  # fmt: skip
    (folder / f"{ranks.rank}.json").write_text(json.dumps(told))


APART = tuple(replace(site, student_inputs=(0.0, 0.0)) for site in SITES)


def sites(folder: Path) -> None:
    distill(build(folder, sites=APART), latents(), Wide(), parallel="sites", **ALWAYS)


TERMS = Stage2(steps=STEPS, batch=10, lr=1e-3, warmup=2, ema=0.9, teacher=0.5, features=0.5)


def _stage2(folder: Path, way: str, task: Wide | None = None, **options: Any) -> None:
    sites = [tiny.attention_site(i) for i in (1, 2)]
    make = double(lambda: tiny.hyena((1, 2)))
    made = build(folder, sites=sites, make_student=make, stage2=TERMS)
    finetune(made, latents(), task or Wide(), threads=1, parallel=way, **options)


def stage2_data(folder: Path) -> None:
    _stage2(folder, "data")


def stage2_pieces(folder: Path) -> None:
    _stage2(folder, "pieces")


def stage2_lora(folder: Path) -> None:
    _stage2(folder, "pieces", train="lora(2)", checkpointing=True)


class Mortal(Wide):
    """One rank is killed, once, a while after the first checkpoint; a folder that has seen it die lets it live."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left = folder, 40
        count = int(os.environ.get("WORLD_SIZE", "1"))
        self.dies = count > 1 and int(os.environ["RANK"]) == count // 2

    def prepare(self, sample: Any, generator: torch.Generator) -> tiny.Made:
        mark = self.folder / "died"
        if self.dies and not mark.exists() and any(self.folder.glob("runs/*/checkpoint.*")):
            self.left -= 1
            if self.left == 0:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(sample, generator)


def begun(folder: Path) -> str | None:
    """The run to resume; None at the first launch."""
    return next(iter(runs(folder)), None)


def killed_data(folder: Path) -> None:
    made = build(folder)
    distill(made, latents(), Mortal(folder), checkpoint_every=3, resume=begun(folder), **ALWAYS)


def killed_sites(folder: Path) -> None:
    made, way = build(folder, sites=APART), {"parallel": "sites", "checkpoint_every": 3}
    distill(made, latents(), Mortal(folder), resume=begun(folder), **way, **ALWAYS)


def killed_stage2(folder: Path) -> None:
    """In pieces, then whole in each process."""
    way = "data" if begun(folder) else "pieces"
    _stage2(folder, way, Mortal(folder), checkpoint_every=3, resume=begun(folder))


def broken(folder: Path) -> None:
    """DATA that one rank cannot read."""

    class Half(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if os.environ.get("RANK") == "1":
                raise OSError("the disk of this node is gone")
            return super().__getitem__(index)

    distill(build(folder), Half(latents()), Wide(), **ALWAYS)


def stuck(folder: Path) -> None:
    """A rank that no longer answers."""

    class Slow(Wide):
        def prepare(self, sample: Any, generator: torch.Generator) -> tiny.Made:
            if os.environ.get("RANK") == "1":
                time.sleep(60)
            return super().prepare(sample, generator)

    distill(build(folder), latents(), Slow(), **ALWAYS)


JOBS: dict[str, Callable[[Path], None]] = {
    "data": data,
    "replay": replay,
    "sites": sites,
    "held": held,
    "teacher_pieces": teacher_pieces,
    "stage2_data": stage2_data,
    "stage2_pieces": stage2_pieces,
    "stage2_lora": stage2_lora,
    "killed_stage2": killed_stage2,
    "killed_data": killed_data,
    "killed_sites": killed_sites,
    "broken": broken,
    "stuck": stuck,
}


def rank(folder: Path, names: list[str]) -> int:
    """What one process does; returns its exit status."""
    torch.set_num_threads(1)
    try:
        with joined():  # one group for all jobs
            for name in names:
                JOBS[name](folder / name)
    except GraftError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def main(count: int, folder: Path, names: list[str]) -> int:
    """Run the jobs in so many forks; as torchrun, end all where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: dict[int, int] = {}
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count),
                              LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))  # fmt: skip
            status = 1
            try:
                status = rank(folder, names)
            except SystemExit as leaving:
                status = int(leaving.code or 0)
            except BaseException as error:
                print(repr(error), getattr(error, "__notes__", ""), file=sys.stderr, flush=True)
            os._exit(status)
        children[child] = number
    worst = 0
    while children:
        child, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        del children[child]
        if code and not worst:
            worst = code
            time.sleep(1.0)  # time to say what they have to say
            for other in children:
                os.kill(other, signal.SIGTERM)
    return abs(worst)


if __name__ == "__main__":
    ranks, place, jobs = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.exit(main(ranks, place, jobs) if ranks else rank(place, jobs))
