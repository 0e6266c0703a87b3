"""Linear least squares from streamed normal equations."""

from __future__ import annotations

import torch
from torch import Tensor


class NormalEquations:
    """The affine map that best sends inputs to targets, from sums over batches, in float64.

    Only [in, in] and [in, out] sums are kept, however many rows were added.

    >>> equations = NormalEquations(inputs=1, outputs=1)
    >>> equations.add(torch.tensor([[0.], [1.]]), torch.tensor([[1.], [3.]]))
    >>> [round(x.item(), 6) for x in equations.solve(ridge=0)]
    [2.0, 1.0]
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self._xx, self._xy = zeros(inputs, inputs), zeros(inputs, outputs)
        self._x, self._y, self._yy = zeros(inputs), zeros(outputs), zeros()

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ of the inputs, [in, in]."""
        return self._xx

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Rows of inputs [n, in] and of targets [n, out]."""
        x, y = inputs.to(self._xx), targets.to(self._xy)
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError("least squares: an input or a target is not finite")
        self.rows += len(x)
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._yy += y.square().sum()

    def solve(self, ridge: float = 1e-6, *, bias: bool = True) -> tuple[Tensor, Tensor]:
        """(weight [out, in], bias [out]) in float64.

        `ridge` penalises the weight, not the bias, in units of the inputs' mean variance. Without
        `bias` the map goes through the origin, and the bias given back is zero.
        """
        if self.rows == 0:
            raise ValueError("least squares: no rows were added")
        mean_x, mean_y = self._x / self.rows, self._y / self.rows
        if not bias:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        xx = self._xx - self.rows * torch.outer(mean_x, mean_x)
        xy = self._xy - self.rows * torch.outer(mean_x, mean_y)
        damped = xx + ridge * xx.diagonal().mean() * torch.eye(len(xx)).to(xx)
        root, failed = torch.linalg.cholesky_ex(damped)
        if failed:  # fewer rows than inputs, or an input that never varies: the smallest solution
            weight = torch.linalg.pinv(damped, hermitian=True) @ xy
        else:
            weight = torch.cholesky_solve(xy, root)
        return weight.T, mean_y - weight.T @ mean_x

    def relative_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """‖targets − (inputs · weightᵀ + bias)‖ / ‖targets‖ over all rows added."""
        w = weight.to(self._xx).T
        b = torch.zeros_like(self._y) if bias is None else bias.to(self._y)
        error = (
            self._yy
            - 2 * (w * self._xy).sum()
            + (w * (self._xx @ w)).sum()
            + 2 * b @ (w.T @ self._x - self._y)
            + self.rows * b.square().sum()
        )
        # The sum of large terms may end a rounding error below zero.
        return float((error.clamp(min=0) / self._yy.clamp(min=1e-300)).sqrt())
