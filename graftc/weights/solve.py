"""Fitting an operator's last linear map to calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftc.weights.least_squares import NormalEquations
from graftc.weights.parts import Affine
from graftc.weights.policies import whitened_svd

Batches = Sequence[tuple[tuple[Tensor, ...], Tensor]]
"""(inputs, target) of each batch; read more than once."""


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


def relative_error(module: nn.Module, batches: Batches) -> float:
    """‖target − output‖ / ‖target‖ over all batches.

    >>> relative_error(nn.Identity(), [((torch.ones(3),), torch.full((3,), 2.0))])
    0.5
    """
    square, energy = 0.0, 0.0
    with torch.no_grad():
        for inputs, target in batches:
            square += float((target - module(*inputs)).double().square().sum())
            energy += float(target.double().square().sum())
    return (square / max(energy, 1e-300)) ** 0.5


def _error(equations: NormalEquations, linear: nn.Linear) -> float:
    bias: Tensor | None = linear.bias
    return equations.relative_error(linear.weight.detach(), None if bias is None else bias.detach())


def solve_svd(
    module: nn.Module,
    inner: str,
    outer: str,
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor]],
) -> Solved:
    """Set two Linears, one after the other, to the product of their rank that is best on the inputs.

    The targets are those of one affine map, which is found first; then it is cut to the rank in the
    norm of its inputs (SVD-LLM, arXiv 2403.07378). `inner` reads the module's first input.

    >>> thin = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2))
    >>> x = torch.randn(64, 2) * torch.tensor([9.0, 0.1])
    >>> solve_svd(thin, "0", "1", [((x,), x)]).after < 0.05
    True
    """
    first, second = module.get_submodule(inner), module.get_submodule(outer)
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        raise ValueError(f"svd: {inner} and {outer} are not two Linears")
    bias: Tensor | None = second.bias
    equations = NormalEquations(first.in_features, second.out_features, first.weight.device)
    for inputs, target in batches:
        equations.add(
            inputs[0].reshape(-1, first.in_features), target.reshape(-1, second.out_features)
        )
    whole, offset = equations.solve(ridge=1e-9, bias=bias is not None)

    def error() -> float:
        product = second.weight.detach().double() @ first.weight.detach().double()
        return equations.relative_error(product, None if bias is None else bias.detach())

    before = error()
    thin, wide = whitened_svd(Affine(whole, offset), equations.gram, first.out_features)
    with torch.no_grad():
        first.weight.copy_(thin.weight)
        second.weight.copy_(wide.weight)
        if bias is not None:
            bias.copy_(offset)
    return Solved(before, error(), equations.rows)
