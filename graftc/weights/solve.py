"""Fitting an operator's last linear map to calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftc.weights.least_squares import NormalEquations


@dataclass(frozen=True)
class Solved:
    """‖target − output‖ / ‖target‖ over the calibration inputs, before and after."""

    before: float
    after: float
    rows: int


def solve_least_squares(
    module: nn.Module,
    submodule: str,
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    *,
    ridge: float = 1e-6,
) -> Solved:
    """Set the Linear `submodule` so that `module(*inputs)` is nearest to the target.

    One pass over `batches` of (inputs, target). The Linear must be the module's last map: its
    output is the module's (ValueError otherwise). `ridge`: see `NormalEquations.solve`.

    >>> class Twice(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.proj = nn.Linear(1, 1)
    ...     def forward(self, x):
    ...         return self.proj(2 * x)
    >>> x = torch.randn(16, 1)
    >>> module = Twice()
    >>> round(solve_least_squares(module, "proj", [((x,), 6 * x)], ridge=0).after, 4)
    0.0
    >>> round(module.proj.weight.item(), 4)
    3.0
    """
    linear = module.get_submodule(submodule)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"least squares: {submodule} is a {type(linear).__name__}, not a Linear")
    calls: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    equations = NormalEquations(linear.in_features, linear.out_features, linear.weight.device)
    handle = linear.register_forward_hook(record)
    try:
        with torch.no_grad():
            for inputs, target in batches:
                calls.clear()
                output = module(*inputs)
                if len(calls) != 1:
                    raise ValueError(f"least squares: {submodule} ran {len(calls)} times, not once")
                seen, made = calls[0]
                same = made.shape == output.shape and torch.equal(made, output)
                if made is not output and not same:
                    raise ValueError(f"least squares: {submodule} is not the module's last map")
                if target.shape != output.shape:
                    raise ValueError(
                        f"least squares: the target is {list(target.shape)},"
                        f" the output {list(output.shape)}"
                    )
                equations.add(
                    seen.reshape(-1, linear.in_features), target.reshape(-1, linear.out_features)
                )
    finally:
        handle.remove()
    bias: Tensor | None = linear.bias
    before = _error(equations, linear)
    weight, offset = equations.solve(ridge, bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            bias.copy_(offset)
    return Solved(before, _error(equations, linear), equations.rows)


def _error(equations: NormalEquations, linear: nn.Linear) -> float:
    bias: Tensor | None = linear.bias
    return equations.relative_error(linear.weight.detach(), None if bias is None else bias.detach())
