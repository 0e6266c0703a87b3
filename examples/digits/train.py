"""Train the digits teacher on one CPU core.

    OMP_NUM_THREADS=1 python examples/digits/train.py --minutes 48

Muon (Jordan et al. 2024) for the matrices of attention and MLP, AdamW for the rest; warm-up, then a cosine to zero that is laid
over the wall-clock budget, so that a slow machine ends with a finished schedule. Averaged (EMA) weights are kept and are what
`teacher.safetensors` holds. The run can be stopped and started again: state lies in safetensors files, nothing is pickled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Digits
from model import WEIGHTS, DiT, task
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """Training settings. Times are in seconds of this process's wall clock; `progress` runs from 0 to 1 over `seconds`."""

    seconds: float
    batch: int = 64
    lr: float = 2e-3
    warmup_steps: int = 200
    ema: float = 0.999
    clip: float = 1.0
    muon: bool = True
    compile: bool = True
    bf16: bool = False
    seed: int = 0
    score_every: float = 420.0
    save_every: float = 120.0


def optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' attention and MLP matrices, AdamW for embeddings, modulation, biases and the last layer."""
    matrices, rest = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        inner = name.startswith("blocks.") and parameter.ndim == 2 and "adaLN" not in name
        (matrices if inner and settings.muon else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    if not matrices:
        return [adam]
    # match_rms_adamw scales Muon's step to the size of AdamW's, so one rate serves both.
    return [
        torch.optim.Muon(
            matrices, lr=settings.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        adam,
    ]


def rate(settings: Settings, step: int, progress: float) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero at progress 1."""
    return (
        min(1.0, (step + 1) / settings.warmup_steps)
        * 0.5
        * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of one shuffled batch after another, for ever; the odd rest of an epoch is left out."""
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the averaged weights towards the current ones, keeping the share `keep` of the old average."""
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)


def save_atomic(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that a reader sees whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(
        {name: value.detach().contiguous().clone() for name, value in tensors.items()},
        partial,
        metadata=metadata,
    )
    partial.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(partial, path)


def checkpoint(
    path: Path,
    model: nn.Module,
    ema: nn.Module,
    opts: list[torch.optim.Optimizer],
    clock: dict[str, float],
) -> None:
    """Store weights, average, optimiser moments and clock in one safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {
        f"ema.{k}": v for k, v in ema.state_dict().items()
    }
    for number, opt in enumerate(opts):
        for key, state in opt.state_dict()["state"].items():
            tensors |= {
                f"opt{number}.{key}.{name}": torch.as_tensor(value) for name, value in state.items()
            }
    save_atomic(tensors, path, {"clock": json.dumps(clock)})


def resume(
    path: Path, model: nn.Module, ema: nn.Module, opts: list[torch.optim.Optimizer]
) -> dict[str, float]:
    """Read what `checkpoint` wrote; returns the clock."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        clock: dict[str, float] = json.loads(file.metadata()["clock"])
    for prefix, module in (("model.", model), ("ema.", ema)):
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    for number, opt in enumerate(opts):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"opt{number}."):
                _, key, field = name.split(".", 2)
                state.setdefault(int(key), {})[field] = value
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    return clock


def held_out_loss(model: nn.Module) -> float:
    """The task's loss on the 297 held-out images, at the same noise and timesteps each time (4 draws an image)."""
    objective, generator, batch = (
        task(),
        torch.Generator().manual_seed(1),
        Digits("held_out").batch(),
    )
    with torch.inference_mode():
        drawn = [objective.prepare(batch, generator) for _ in range(4)]
        return sum(
            objective.loss(model(**prepared.inputs), prepared).item() for prepared in drawn
        ) / len(drawn)


def train(settings: Settings, *, weights: Path, state: Path, log: Path, samples: int) -> None:
    """Run, or go on with, the training until its wall-clock budget is spent."""
    from frechet import score

    torch.manual_seed(settings.seed)
    objective, data = task(), Digits("train")
    model, ema = DiT(), DiT().requires_grad_(False).eval()
    ema.load_state_dict(model.state_dict())
    opts = optimizers(model, settings)
    clock = (
        resume(state, model, ema, opts) if state.exists() else {"step": 0, "wall": 0.0, "loss": 1.0}
    )
    step, spent = int(clock["step"]), clock["wall"]
    # A resumed run draws from a fresh stream: repeating the first run's batches would be worse than losing its place.
    generator = torch.Generator().manual_seed(settings.seed + step)
    forward = torch.compile(model) if settings.compile else model
    mean_loss, started = clock["loss"], time.monotonic()
    last_score = last_save = spent
    for rows in batches(len(data), settings.batch, generator):
        wall = spent + time.monotonic() - started
        factor = rate(settings, step, wall / settings.seconds)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = settings.lr * factor
        prepared = objective.prepare(data.batch(rows), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            outputs = forward(**prepared.inputs)
        loss = objective.loss(outputs, prepared)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        average(ema, model, min(settings.ema, (1 + step) / (10 + step)))
        step += 1
        mean_loss = 0.99 * mean_loss + 0.01 * loss.item()
        done = wall >= settings.seconds
        if step % 100 == 0 or done:
            print(
                f"step {step} loss {mean_loss:.4f} lr {settings.lr * factor:.2e} wall {wall:.0f}",
                flush=True,
            )
        if done or wall - last_save >= settings.save_every:
            last_save = wall
            save_atomic(ema.state_dict(), weights)
            checkpoint(state, model, ema, opts, {"step": step, "wall": wall, "loss": mean_loss})
        if done or wall - last_score >= settings.score_every:
            last_score = wall
            result = score(ema, objective, samples=samples, seeds=[0])
            line = {
                "step": step,
                "wall_s": round(wall),
                "loss": mean_loss,
                "held_out_loss": held_out_loss(ema),
                "frechet": result.mean,
            }
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if done:
            return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=48)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--adamw", action="store_true", help="AdamW for every parameter")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--bf16", action="store_true", help="run the model under bfloat16 autocast")
    parser.add_argument("--score-every", type=float, default=7, help="minutes between scores")
    parser.add_argument("--samples", type=int, default=1000, help="samples a score")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("train_log.jsonl"))
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("/tmp/digits_state.safetensors"),
        help="where to keep what a resume needs",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        seconds=60 * args.minutes,
        batch=args.batch,
        lr=args.lr,
        ema=args.ema,
        muon=not args.adamw,
        compile=not args.eager,
        bf16=args.bf16,
        score_every=60 * args.score_every,
    )
    train(settings, weights=args.weights, state=args.state, log=args.log, samples=args.samples)


if __name__ == "__main__":
    main()
