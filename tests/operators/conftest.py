"""How every operator is compared with its reference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
Reference = Callable[[Weights, Tensor], Tensor]
LENGTHS = (1, 7, 64, 100)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.fixture
def agrees() -> Callable[..., None]:
    """`agrees(module, reference)`: outputs and all gradients, at every length and dtype.

    `reference(weights, x)` computes from the definition, in whatever dtype it is given. `fixed`:
    the operator takes no other length.
    """

    def check(
        module: nn.Module,
        reference: Reference,
        dim: int,
        lengths: tuple[int, ...] = LENGTHS,
        fixed: bool = False,
    ) -> None:
        torch.manual_seed(0)
        for length in lengths:
            for batch in (1, 3) if length == 7 or fixed else (2,):
                _compare(module, reference, torch.randn(batch, length, dim, dtype=torch.float64))
        for length in (n for n in lengths if n < 30) if fixed else (1, 7):
            x = torch.randn(1, length, dim, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(module.double(), (x,))
        tokens = lengths[0] if fixed else 5
        nobody = torch.zeros(0, tokens, dim).double()
        assert module(nobody).shape == (0, *module(torch.zeros(1, tokens, dim).double()).shape[1:])

    return check


def _compare(module: nn.Module, reference: Reference, x: Tensor) -> None:
    module = module.double()
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    wanted_x = x.clone().requires_grad_()
    wanted = reference(weights, wanted_x)
    tangent = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, [wanted_x, *weights.values()], tangent)

    given_x = x.clone().requires_grad_()
    given = module(given_x)
    given_grads = torch.autograd.grad(given, [given_x, *module.parameters()], tangent)
    assert given.shape == wanted.shape
    assert _relative(given, wanted) <= 1e-10
    for name, a, b in zip(["x", *weights], given_grads, wanted_grads, strict=True):
        assert _relative(a, b) <= 1e-9 or b.norm() < 1e-9, name

    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        with torch.no_grad():
            low = copy.deepcopy(module).to(dtype)(x.to(dtype))
            # The reference takes the weights and inputs as they were rounded.
            rounded = {n: w.to(dtype).double() for n, w in weights.items()}
            near = reference(rounded, x.to(dtype).double())
        assert low.dtype == dtype
        assert _relative(low, near) <= bound, dtype
