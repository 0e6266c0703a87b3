"""Fitting all the maps of an operator in which it is linear, one after the other.

A gated convolution is a product of linear maps: linear in each of them while the others stand
still, and channel by channel, since a row of one map feeds one channel of what the last map
reads. So each row is a small least-squares problem of its own, and no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graftc.weights.solve import Solved, solve_least_squares

Batches = Sequence[tuple[tuple[Tensor, ...], Tensor]]
"""(inputs, target) of each batch; read once for every solve."""


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` (end excluded) of a Linear or a depthwise filter, with their bias.

    Row start + c alone of these feeds channel c of the last map's input.
    """

    module: str
    start: int
    stop: int


def solve_alternating(
    module: nn.Module,
    last: str,
    blocks: Sequence[Block],
    batches: Batches,
    *,
    sweeps: int = 4,
    ridge: float = 1e-4,
) -> Solved:
    """Fit `blocks` in turn, `sweeps` times over, then the Linear `last`, in place.

    While the blocks are fitted `last` stands still, and they are fitted to what it would have to
    read: the target taken back through it. `last` must be square and of full rank (ValueError).
    `ridge` is in units of a row's mean feature energy.

    >>> class Product(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = (nn.Linear(2, 2) for _ in range(3))
    ...     def forward(self, x):
    ...         return self.out(self.a(x) * self.b(x))
    >>> torch.manual_seed(0) and None
    >>> x, true, made = torch.randn(200, 2), Product(), Product()
    >>> both = [Block("a", 0, 2), Block("b", 0, 2)]
    >>> solve_alternating(made, "out", both, [((x,), true(x).detach())], sweeps=50).after < 0.1
    True
    """
    linear = module.get_submodule(last)
    if not isinstance(linear, nn.Linear) or linear.in_features != linear.out_features:
        raise ValueError(f"alternating least squares: {last} is no square Linear")
    back = torch.linalg.pinv(linear.weight.detach().double())
    offset = linear.bias.detach().double() if linear.bias is not None else 0.0
    wanted = [((y.double() - offset) @ back.T).to(y) for _, y in batches]
    with torch.no_grad():
        for _ in range(sweeps):
            for block in blocks:
                _fit(module, last, block, batches, wanted, ridge)
    return solve_least_squares(module, last, batches)


def _fit(
    module: nn.Module,
    last: str,
    block: Block,
    batches: Batches,
    wanted: Sequence[Tensor],
    ridge: float,
) -> None:
    """The rows of one block, all at once: for each, features [rows, columns] and one target."""
    owner = module.get_submodule(block.module)
    weight, bias = owner.get_parameter("weight"), owner.get_parameter("bias")
    rows = slice(block.start, block.stop)
    channels, columns = block.stop - block.start, weight[rows].flatten(1).shape[1] + 1
    gram = torch.zeros(channels, columns, columns, dtype=torch.float64, device=weight.device)
    moment = torch.zeros(channels, columns, dtype=torch.float64, device=weight.device)
    for (inputs, _), target in zip(batches, wanted, strict=True):
        found = list(_features(module, last, block, inputs))
        constant, features = found[0], torch.stack(found[1:], dim=-1)
        features = features - constant.unsqueeze(-1)
        features = features.flatten(0, -3).transpose(0, 1)
        left = (target - constant).flatten(0, -2).T.unsqueeze(-1)
        gram += features.transpose(1, 2) @ features
        moment += (features.transpose(1, 2) @ left).squeeze(-1)
    scale = ridge * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    gram += scale[:, None, None] * torch.eye(columns).to(gram)
    solved = torch.linalg.solve(gram, moment).to(weight)
    weight[rows] = solved[:, :-1].reshape(weight[rows].shape)
    bias[rows] = solved[:, -1]


def _features(
    module: nn.Module, last: str, block: Block, inputs: tuple[Tensor, ...]
) -> Iterator[Tensor]:
    """What `last` reads with the block's rows 0, then with each of their columns 1, then the bias."""
    owner = module.get_submodule(block.module)
    weight, bias = owner.get_parameter("weight").detach(), owner.get_parameter("bias").detach()
    rows = slice(block.start, block.stop)
    blank, still = weight.clone(), bias.clone()
    blank[rows], still[rows] = 0, 0
    names = f"{block.module}.weight", f"{block.module}.bias"
    yield _read(module, last, dict(zip(names, (blank, still), strict=True)), inputs)
    for column in range(weight[rows].flatten(1).shape[1]):
        one = blank.clone()
        one[rows].flatten(1)[:, column] = 1
        yield _read(module, last, dict(zip(names, (one, still), strict=True)), inputs)
    one = still.clone()
    one[rows] = 1
    yield _read(module, last, dict(zip(names, (blank, one), strict=True)), inputs)


def _read(
    module: nn.Module, last: str, parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
) -> Tensor:
    seen: list[Tensor] = []
    handle = module.get_submodule(last).register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    try:
        functional_call(module, dict(parameters), inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"alternating least squares: {last} ran {len(seen)} times, not once")
    return seen[0]
