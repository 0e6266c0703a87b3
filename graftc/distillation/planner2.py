"""What a run of stage 2 will take, before it starts: time, memory and disk, by what takes it.

Bytes and FLOPs come from a step on fake tensors, seconds from one step that is run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from graftc.diagnostics import fail
from graftc.distillation.optim import Group, Optimiser, Schedule, clip_or_drop, gradient_norm
from graftc.distillation.planner import Machine, bytes_of
from graftc.distillation.recompute import blocks_of, recomputed
from graftc.distillation.resident import MEASURED_STEPS, Allocator, Bytes, allocator_of
from graftc.distillation.scopes import keeping_buffers, random_of
from graftc.distillation.sizes import Live
from graftc.distillation.terms import Terms

_VALIDATIONS = 10
"""Measurements on the held-out samples in a run: eight on the way, one before it and one of the average."""


_COPIED = 16 * 10**6
"""Bytes of parameters on whose copies an update is timed; beside them stand gradients, moments and an average, as large."""


@dataclass(frozen=True)
class Stage2Costs:
    """Bytes of tensors by what they are, and FLOPs of a step.

    `weights`: of the student, and of the teacher where a term needs it. `trained`: of the parameters that train;
    each has a gradient, AdamW's two moments and an average. `seconds`: of a forward and backward pass; `update`: of what
    follows it, clipping, AdamW and the average. `step`: what is alive at most in a forward and
    backward pass, its gradients too, besides all these; `forward`: without a backward pass. `others`: `step` with
    every block checkpointed, where it is not asked for and there are blocks.
    """

    weights: int
    trained: int
    step: Bytes
    forward: Bytes
    flops: int
    checkpointed: Bytes | None
    allocator: Allocator
    steps: int = 0
    batch: int = 1
    held_out: int = 0
    previews: bool = False
    ranks: int = 1
    seconds: float | None = None
    update: float = 0.0

    @property
    def stays(self) -> int:
        """Weights, AdamW's moments and the average; with several processes, DDP's copy of the gradients."""
        return self.weights + (3 + (self.ranks > 1)) * self.trained

    def peak(self, step: Bytes | None = None, allocator: Allocator | None = None) -> int:
        """Bytes that the device's memory has at most; `Allocator()` counts tensors alone."""
        sampled = Bytes(self.trained) + self.forward if self.previews else self.forward
        ways = [step or self.step, sampled]
        own = self.allocator if step is None else self.allocator.unmeasured()
        return (allocator or own).resident(self.stays, ways)

    @property
    def disk(self) -> int:
        """The checkpoint, twice while it is replaced, and the weights at the end."""
        return 2 * 4 * self.trained + self.weights


@dataclass(frozen=True)
class Stage2Plan:
    """A run of stage 2 as it was planned, for one of its processes."""

    costs: Stage2Costs
    machine: Machine

    @property
    def peak(self) -> int:
        return self.costs.peak()

    @property
    def seconds(self) -> float | None:
        """Of the steps and the measurements; not of reading DATA, of the task's `prepare`, of checkpoints and previews."""
        costs = self.costs
        if costs.seconds is None:
            return None
        measured = _VALIDATIONS * math.ceil(costs.held_out / costs.batch)
        return (costs.steps + measured / 3) * costs.seconds + costs.steps * costs.update

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are, in the order in which they are told; together they are the peak."""
        costs = self.costs
        alive = costs.peak(allocator=Allocator())
        return {
            "weights": costs.weights,
            "AdamW's moments": 2 * costs.trained,
            "average": costs.trained,
            **({"DDP's buckets": costs.trained} if costs.ranks > 1 else {}),
            "activations and gradients": alive - costs.stays,
            "holes in the heap, and code": self.peak - alive,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data: bytes, seconds, FLOPs."""
        costs = self.costs
        return {
            "steps": costs.steps,
            "batch": costs.batch,
            "seconds": self.seconds,
            "peak_memory": self.peak,
            "parts": self.parts,
            "checkpointed_peak_memory": None if costs.checkpointed is None else costs.peak(costs.checkpointed),
            "disk": costs.disk,
            "flops": costs.flops,
            "machine": asdict(self.machine),
        }  # fmt: skip


def stage2_costs(
    module: nn.Module,
    loss: Terms,
    parameters: Mapping[str, nn.Parameter],
    prepared: Any,
    device: str,
    teacher: nn.Module | None = None,
) -> Stage2Costs:
    """The costs of a step on the batch `prepared`; `teacher`: one that is in memory too.

    Raises GraftError (G841) where model, task or teacher cannot run on fake tensors.
    """
    trained = list(parameters.values())
    terms = loss.stage2

    def step(again: bool) -> None:
        with recomputed(module, loss.graphs) if again else nullcontext():
            value, _ = loss(prepared)
            torch.autograd.grad(value, trained, allow_unused=True)

    def most(again: bool) -> Bytes:
        with Live() as live:
            step(again)
        return live.most

    was_training = module.training
    try:
        with keeping_buffers(module), FakeTensorMode(allow_non_fake_inputs=True):
            module.train()
            made = most(terms.checkpointing)
            other = None if terms.checkpointing or not blocks_of(module) else most(again=True)
            with FlopCounterMode(display=False) as flops:  # apart: it keeps what is computed again
                step(terms.checkpointing)
            with torch.no_grad(), Live() as live:
                module(**prepared.inputs)
    except Exception as error:  # whatever a model or a task raises on a fake tensor
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail("G841", f"the sizes of a step of stage 2 cannot be computed: {first}", site="stage 2",
             help="without --dry-run nothing needs to be computed")  # fmt: skip
    finally:
        module.train(was_training)
    models = [m for m in (module, teacher, loss.teacher) if m is not None]
    size = sum(p.nbytes for p in trained)
    total = int(flops.get_total_flops())
    return Stage2Costs(bytes_of(*models), size, made, live.most, total, other, allocator_of(device))


def seconds_of(
    module: nn.Module,
    loss: Terms,
    parameters: Sequence[nn.Parameter],
    prepared: Any,
    seed: int,
    device: str = "cpu",
) -> float:
    """Seconds of a forward and a backward pass: run a few times, and nothing is learned from it."""
    seconds, was_training = 0.0, module.training
    again = recomputed(module, loss.graphs) if loss.stage2.checkpointing else nullcontext()
    module.train()
    try:
        with keeping_buffers(module), random_of(seed, "measure", device=device), again:
            for _ in range(MEASURED_STEPS):
                started = time.perf_counter()
                value, _parts = loss(prepared)
                torch.autograd.grad(value, parameters, allow_unused=True)
                value.item()  # a device has done its work
                seconds = time.perf_counter() - started
    finally:
        module.train(was_training)
    return seconds


def update_seconds(parameters: Sequence[nn.Parameter], copied: int = _COPIED) -> float:
    """Seconds of clipping, a step of AdamW and of the average, on copies of at most about `copied` bytes, scaled to all.

    All of it goes element by element, so that pieces of tensors tell of the whole.

    >>> update_seconds([nn.Parameter(torch.ones(8))]) > 0
    True
    """
    copies: dict[str, nn.Parameter] = {}
    taken = 0
    for parameter in parameters:
        count = min(parameter.numel(), max(0, copied - taken) // parameter.element_size())
        if count:
            copies[str(len(copies))] = nn.Parameter(parameter.detach().reshape(-1)[:count].clone())
            taken += count * parameter.element_size()
    if not copies:
        return 0.0
    own = list(copies.values())
    average: list[Tensor] = [p.detach().clone() for p in own]
    schedule = Schedule(MEASURED_STEPS, shape="constant")
    optimiser = Optimiser("adamw", [Group("model", copies, None, schedule)])
    seconds = 0.0
    for step in range(MEASURED_STEPS):
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        gradient_norm(own).item()  # a device has made them
        started = time.perf_counter()
        clip_or_drop(own, float(gradient_norm(own)), 1.0)
        optimiser.step(step)
        newest: list[Tensor] = [p.detach() for p in own]
        torch._foreach_lerp_(average, newest, 0.1)
        average[-1].sum().item()  # a device has done its work
        seconds = time.perf_counter() - started
    return seconds * sum(p.nbytes for p in parameters) / taken
