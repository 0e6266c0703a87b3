"""Kills runs at chosen points and resumes them: `python -m tests.distillation.kills STAGE FOLDER SEED COUNT`.

A point is a number of calls and returns of Python functions, so a run dies anywhere: in a step, while a
checkpoint is half written, between a file and its rename. Every run is a fork of this process, which has
imported all and computed nothing. Prints one JSON object a point.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # as optimisers do at their first step: not in every fork
from safetensors.torch import load_file

import graftc.distillation.preview  # noqa: F401  imported here, so that no fork imports it again
from graftc.distillation import distill, finetune, runs
from graftc.distillation.targets import Budget, Lora, Stage2
from tests.distillation import tiny

SITES = (
    tiny.attention_site(1, budget=Budget(steps=9), solve=True),
    tiny.attention_site(2, budget=Budget(steps=24, patience=2, lr=3.0), student_inputs=(0.0, 1.0)),
    tiny.pair_site(after=("blocks.2.attn",), budget=Budget(steps=6)),
)
STAGE2 = Stage2(steps=18, batch=8, lr=1e-2, ema=0.9, teacher=0.5, features=0.5, checkpointing=True)


def build(path: Path) -> tiny.FakeBuild:
    path.mkdir(parents=True, exist_ok=True)
    targets = tiny.targets(*SITES, stage2=STAGE2)
    return tiny.FakeBuild(path, targets, make_student=lambda: tiny.paired((1, 2)))


class Drawn(tiny.Denoise):
    def sample(self, model: Any, *, count: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(count, tiny.TOKENS, tiny.DIM, generator=generator)
        return model(x=x, t=torch.full((count,), 500))[:, None].clamp(-1, 1)


def stage1(path: Path) -> None:
    made = build(path)
    given: dict[str, Any] = {"batch": 8, "stacked": "never", "threads": 1, "optimiser": "adamw"}
    distill(
        made, tiny.latents(40), tiny.Denoise(), checkpoint_every=2, resume=_begun(path), **given
    )


def stage2(path: Path) -> None:
    made = build(path)
    given: dict[str, Any] = {"threads": 1, "preview": 7}
    finetune(made, tiny.latents(40), Drawn(), checkpoint_every=3, resume=_begun(path), **given)


def adapters(path: Path) -> None:
    made = build(path)
    made.sites = replace(made.sites, stage2=replace(STAGE2, train=Lora(2)))
    made.__post_init__()
    finetune(made, tiny.latents(40), Drawn(), checkpoint_every=3, resume=_begun(path), threads=1)


STAGES: dict[str, Callable[[Path], None]] = {"1": stage1, "2": stage2, "lora": adapters}


def _begun(path: Path) -> str | None:
    """The run to resume; None where the first died before it had a record."""
    return next(iter(runs(path)), None)


def forked(function: Callable[[Path], None], path: Path, point: int | None) -> tuple[int, int]:
    """Run in a fork, killed at `point`. Returns (exit status as of a shell, calls counted)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def profile(*_: object) -> None:
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            torch.set_num_threads(1)
            sys.setprofile(profile)
            function(path)
            sys.setprofile(None)
            os.write(writer, str(count).encode())
            os._exit(0)
        except BaseException as error:
            sys.setprofile(None)
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 64)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(told or 0)


def outcome(path: Path) -> dict[str, Any]:
    """All that a finished run says and made, but for the time it took and its name."""
    (run,) = [
        path / "runs" / name for name, facts in runs(path).items() if facts["status"] == "finished"
    ]
    facts = runs(path)[run.name]["result"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    files = sorted(p for p in run.rglob("*") if p.suffix in (".safetensors", ".png"))
    held: dict[str, Any] = {str(p.relative_to(run)): _content(p) for p in files}
    story = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return {"files": held, "log": story, "sites": facts["sites"], "metrics": facts["metrics"]}


def _content(path: Path) -> Any:
    if path.suffix == ".png":
        return path.read_bytes().hex()
    return {n: t.numpy().tobytes().hex() for n, t in sorted(load_file(path).items())}


def main(stage: str, folder: Path, seed: int, count: int) -> None:
    function, chosen = STAGES[stage], random.Random(seed)
    status, calls = forked(function, folder / "whole", None)
    assert status == 0, "the run that is not killed failed"
    wanted = outcome(folder / "whole")
    for number in range(count):
        point = chosen.randrange(1, calls)
        path = folder / str(number)
        died, _ = forked(function, path, point)
        again, _ = forked(function, path, None)
        found = outcome(path) if again == 0 else {}
        other = [key for key in wanted if found.get(key) != wanted[key]]
        print(json.dumps({"point": point, "of": calls, "killed": died == -signal.SIGKILL,
                          "resumed": again == 0, "other": other}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
