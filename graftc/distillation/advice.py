"""What a run was expected to take, and the next smaller setting, for one that ran out of memory."""

from __future__ import annotations

import torch
from torch import nn

from graftc.distillation.planner import Choice, Costs, Window, bytes_of, choice, smaller
from graftc.distillation.planner2 import Stage2Costs
from graftc.distillation.recompute import blocks_of
from graftc.distillation.targets import Lora, Stage2
from graftc.units import size_text


def stage1_advice(costs: Costs, made: Choice | None) -> tuple[str, str]:
    """What the planner predicted of a part of stage 1, and the next smaller setting."""
    current = made or choice(costs, "stream", Window(1, 1), {})
    return f"{size_text(current.peak)}, as was predicted", smaller(costs, current)


def loading_advice(device: str) -> tuple[str, str]:
    """The models alone have no room."""
    return f"room on `{device}` for the weights of teacher and student", "a device with more memory"


def stage2_advice(
    module: nn.Module,
    terms: Stage2,
    batch: int,
    trained: int,
    device: str,
    costs: Stage2Costs | None = None,
) -> tuple[str, str]:
    """What stage 2 takes, and the next smaller setting.

    `trained`: bytes of the parameters that train; each has a gradient, AdamW's two moments and an average.
    `costs`: what was predicted, None where sizes cannot be computed: then what there is before any activation. Settings that change nothing in what is learned come first.

    >>> stage2_advice(nn.Linear(1, 1), Stage2(), 64, 8, "cpu")[1]
    '--batch 32, in a new run'
    """
    wanted = f"{size_text(bytes_of(module) + 4 * trained)} before any activation"
    if costs is not None:
        wanted = f"{size_text(costs.peak())} predicted"
    on_gpu = torch.device(device).type != "cpu"
    if not terms.checkpointing and blocks_of(module):
        again = None if costs is None else costs.checkpointed
        there = "" if again is None or costs is None else f"; {size_text(costs.peak(again))}"
        help = "--checkpointing, in a new run: the same gradients, and one block's values"
        return wanted, help + there
    if terms.precision == "float32" and on_gpu:
        return wanted, "--precision bfloat16, in a new run: half the bytes of an activation"
    if batch > 1:
        return wanted, f"--batch {batch // 2}, in a new run"
    if not isinstance(terms.train, Lora):
        return (
            wanted,
            '--train "lora(8)", in a new run: gradients and moments of the adapters alone',
        )
    return wanted, "a machine with more memory: this is one sample, checkpointed"
