"""Optimisers of both stages: AdamW and Muon, schedules, clipping, and a state of named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftc.diagnostics import Diagnostic, NotRunError

Kind = Literal["adamw", "muon"]
Named = Mapping[str, nn.Parameter]

RATES: dict[Kind, tuple[float, float]] = {"adamw": (1e-3, 1e-3), "muon": (0.05, 1e-2)}
"""The peak rates where none is given: of matrices, and of all else.

Muon's are measured: on Hyena-X sites of the digits example, 100 steps from least squares leave
0.21 of the target's energy; AdamW leaves 0.24 at its best rate, and 0.31 in 400 steps from random
weights at 1e-3 (0.23 at 3e-3).
"""


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of its peak: a linear warm-up, then a cosine to 0 or constant.

    `halve_at`: steps from which a constant rate is halved, each time.

    >>> schedule = Schedule(total=10, warmup=2)
    >>> [round(schedule(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    total: int
    warmup: int = 0
    shape: Literal["cosine", "constant"] = "cosine"
    halve_at: tuple[int, ...] = ()

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 0.5 ** sum(step >= at for at in self.halve_at)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak rate and a schedule: a site's, or the whole model's.

    `lr` is a rate as AdamW's; None leaves it to the optimiser.
    """

    name: str
    parameters: Named
    lr: float | None
    schedule: Schedule


class Optimiser:
    """AdamW, or Muon on matrices with AdamW on all else; the state is a dict of named tensors.

    Muon (Jordan et al. 2024) steps by the orthogonalised momentum. Where a rate is given, the step
    is scaled so that its root mean square is AdamW's (`match_rms_adamw`, arXiv 2502.16982), hence
    one rate serves both; where none is, by the matrix's shape, which holds from width to width.
    """

    def __init__(
        self,
        kind: Kind,
        groups: Sequence[Group],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self._groups = {group.name: group for group in groups}
        self._optimisers: list[torch.optim.Optimizer] = []
        self._names: dict[nn.Parameter, str] = {}
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        rates = RATES[kind]
        for group in groups:
            self._names.update({p: name for name, p in group.parameters.items()})
            parameters = list(group.parameters.values())
            matrix = [p for p in parameters if kind == "muon" and p.ndim == 2]
            other = [p for p in parameters if not (kind == "muon" and p.ndim == 2)]
            if matrix:
                lr, scaling = rates[0], "original"
                if group.lr is not None:
                    lr, scaling = group.lr, "match_rms_adamw"
                entry = {"params": matrix, "group": group.name, "peak": lr}
                matrices.append({**entry, "adjust_lr_fn": scaling})
            if other:
                lr = rates[1] if group.lr is None else group.lr
                others.append({"params": other, "group": group.name, "peak": lr})
        if matrices:
            muon = getattr(torch.optim, "Muon", None)
            if muon is None:
                text = f"torch {torch.__version__} has no Muon"
                raise NotRunError(
                    Diagnostic("G540", text, help="use AdamW, or torch 2.9 and later")
                )
            self._optimisers.append(muon(matrices, lr=0.0, weight_decay=weight_decay))
        if others:
            fused = all(p.device.type in ("cpu", "cuda") for g in others for p in g["params"])
            self._optimisers.append(
                torch.optim.AdamW(
                    others, lr=0.0, betas=betas, weight_decay=weight_decay, fused=fused
                )
            )

    def step(self, step: int) -> None:
        """One step at the schedule's rate; a parameter without a gradient is left alone."""
        for optimiser in self._optimisers:
            for entry in optimiser.param_groups:
                entry["lr"] = entry["peak"] * self._groups[entry["group"]].schedule(step)
            optimiser.step()

    def zero(self) -> None:
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`name.key` → tensor, for every parameter that was stepped."""
        found: dict[str, Tensor] = {}
        for optimiser in self._optimisers:
            state: dict[Any, dict[str, Any]] = dict(optimiser.state)
            for parameter, values in state.items():
                for key, value in values.items():
                    found[f"{self._names[parameter]}.{key}"] = torch.as_tensor(value)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, into memory of our own (a mapped file is not aligned)."""
        by_name = {name: parameter for parameter, name in self._names.items()}
        owner: dict[nn.Parameter, torch.optim.Optimizer] = {
            p: o for o in self._optimisers for entry in o.param_groups for p in entry["params"]
        }
        for full, value in state.items():
            name, _, key = full.rpartition(".")
            parameter = by_name[name]
            owner[parameter].state[parameter][key] = value.clone()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The joint L2 norm of all gradients, a scalar tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def clip_or_drop(parameters: Sequence[nn.Parameter], norm: float, limit: float) -> bool:
    """Clip gradients of norm `norm` to `limit`; drop them, and say False, where it is no number."""
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
        return False
    scale_gradients(parameters, min(1.0, limit / (norm + 1e-6)))
    return True


def align(module: nn.Module) -> nn.Module:
    """Move parameters that lie in mapped, unaligned memory into torch's own.

    Matrix products may round otherwise with other alignments: two runs would differ in a bit.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return module


def named(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters, a shared one once."""
    seen: set[int] = set()
    for name, parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter
