"""Fitting all the maps of an operator in which it is linear, one after the other.

A gated convolution is a product of linear maps: linear in each of them while the others stand
still, and channel by channel, since a row of one map feeds one channel of what the last map
reads. So each row is a small least-squares problem of its own, and no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graftc.weights.fit import SWEEPS, Block
from graftc.weights.solve import Batches, Solved, solve_least_squares

ROWS = 8192
"""Rows (tokens of all samples) that the sweeps read at most; the last map is fitted on all that there are.
Twice or four times as many gain under a tenth on the digits, and cost as much more."""

FEATURES = 2**25
"""Numbers of a piece's features that are held at a time."""


def solve_alternating(
    module: nn.Module,
    last: str,
    blocks: Sequence[Block],
    batches: Batches,
    *,
    sweeps: int = SWEEPS,
    ridge: float = 1e-4,
) -> Solved:
    """Fit `blocks` in turn, `sweeps` times over, then the Linear `last`, in place.

    While the blocks are fitted `last` stands still, and they are fitted to what it would have to
    read: the target taken back through its pseudo-inverse. Two blocks must not hold the same rows.
    `ridge` is in units of a row's mean feature energy.

    >>> class Product(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = (nn.Linear(2, 2) for _ in range(3))
    ...     def forward(self, x):
    ...         return self.out(self.a(x) * self.b(x))
    >>> x, true, made = torch.randn(200, 2), Product(), Product()
    >>> made.load_state_dict(true.state_dict()) and None
    >>> _ = made.a.weight.data.zero_()
    >>> block = Block("a", 0, 2)
    >>> solve_alternating(made, "out", [block], [((x,), true(x).detach())]).after < 0.01
    True
    """
    linear = module.get_submodule(last)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"alternating least squares: {last} is a {type(linear).__name__}")
    back = torch.linalg.pinv(linear.weight.detach().double())
    bias: Tensor | None = linear.bias
    offset = 0.0 if bias is None else bias.detach().double()
    pieces = _pieces(batches, linear.in_features)
    wanted = [((y.double() - offset) @ back.T).to(y) for _, y in pieces]
    with torch.no_grad():
        for _ in range(sweeps):
            for block in blocks:
                _fit(module, last, block, pieces, wanted, ridge)
    return solve_least_squares(module, last, batches)


def _pieces(batches: Batches, width: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """As much of the batches as the sweeps read, cut so that a piece's features fit in memory."""
    made: list[tuple[tuple[Tensor, ...], Tensor]] = []
    rows = 0
    for inputs, target in batches:
        if rows >= ROWS:
            break
        count = len(target)
        each = target[0].numel() // target.shape[-1] if count else 0
        rows += count * each
        size = max(1, FEATURES // max(1, each * width * width))
        whole = size >= count or any(x.ndim == 0 or len(x) != count for x in inputs)
        for start in range(0, count, count if whole else size):
            stop = count if whole else start + size
            made.append((tuple(x if whole else x[start:stop] for x in inputs), target[start:stop]))
    return made


def _fit(
    module: nn.Module,
    last: str,
    block: Block,
    pieces: Batches,
    wanted: Sequence[Tensor],
    ridge: float,
) -> None:
    """The rows of one block, all at once: for each, features [rows, columns] and one target."""
    owner = module.get_submodule(block.module)
    weight = owner.get_parameter("weight")
    bias: Tensor | None = dict(owner.named_parameters()).get("bias")
    rows = slice(block.start, block.stop)
    channels, columns = block.stop - block.start, weight[rows].flatten(1).shape[1]
    size = columns + (bias is not None)
    gram = torch.zeros(channels, size, size, dtype=torch.float64, device=weight.device)
    moment = torch.zeros(channels, size, dtype=torch.float64, device=weight.device)
    for (inputs, _), target in zip(pieces, wanted, strict=True):
        constant, *columns_of = _features(module, last, block, inputs)
        if constant.shape != target.shape or constant.shape[-1] != channels:
            raise ValueError(
                f"alternating least squares: {last} reads {list(constant.shape)}, and the block of"
                f" {block.module} has {channels} rows for a target of {list(target.shape)}"
            )
        # [channels, columns, tokens]: what each column of a row adds to the row's own channel.
        features = torch.stack([(c - constant).flatten(0, -2).T for c in columns_of], dim=1)
        left = (target - constant).flatten(0, -2).T.unsqueeze(-1)
        gram += features @ features.transpose(1, 2)
        moment += (features @ left).squeeze(-1)
    scale = ridge * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    gram += scale[:, None, None] * torch.eye(size).to(gram)
    solved = torch.linalg.solve(gram, moment).to(weight)
    weight[rows] = solved[:, :columns].reshape(weight[rows].shape)
    if bias is not None:
        bias[rows] = solved[:, -1]


def _features(
    module: nn.Module, last: str, block: Block, inputs: tuple[Tensor, ...]
) -> Iterator[Tensor]:
    """What `last` reads with the block's rows at 0, then with each of their columns at 1, then the bias."""
    owner = module.get_submodule(block.module)
    rows = slice(block.start, block.stop)
    if isinstance(owner, nn.Linear):
        given, made = _run(module, last, block.module, None, inputs)

        # The map's output is put in place: no product is computed that is known beforehand.
        def output(column: Tensor | float) -> Tensor:
            value = made.clone()
            value[..., rows] = column
            return _run(module, last, block.module, value, inputs)[1]

        yield output(0.0)
        for index in range(owner.in_features):
            yield output(given[..., index : index + 1])
        if owner.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            yield output(1.0)
        return
    weight, bias = owner.get_parameter("weight").clone(), owner.get_parameter("bias").clone()
    weight[rows], bias[rows] = 0, 0

    def read(weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {f"{block.module}.weight": weight, f"{block.module}.bias": bias}
        with _swapped(module, last, _Reader()):
            try:
                functional_call(module, parameters, inputs)
            except _Seen as seen:
                return seen.value
        raise ValueError(f"alternating least squares: {last} does not run")

    yield read(weight, bias)
    for index in range(weight[rows].flatten(1).shape[1]):
        one = weight.clone()
        one[rows].view(block.stop - block.start, -1)[:, index] = 1
        yield read(one, bias)
    one = bias.clone()
    one[rows] = 1
    yield read(weight, one)


class _Seen(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Reader(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise _Seen(x)


class _Given(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


@contextmanager
def _swapped(module: nn.Module, path: str, stand_in: nn.Module) -> Generator[None]:
    parent, _, name = path.rpartition(".")
    owner, before = module.get_submodule(parent), module.get_submodule(path)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _run(
    module: nn.Module, last: str, path: str, value: Tensor | None, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(what `path` read, what it made) without a `value`; with one in its place, (value, what `last` read)."""
    with _swapped(module, last, _Reader()):
        if value is None:
            seen: list[tuple[Tensor, Tensor]] = []

            def record(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
                seen.append((given[0], made))

            handle = module.get_submodule(path).register_forward_hook(record)
            try:
                with suppress(_Seen):
                    module(*inputs)
            finally:
                handle.remove()
            if len(seen) != 1:
                raise ValueError(
                    f"alternating least squares: {path} ran {len(seen)} times, not once"
                )
            return seen[0]
        with _swapped(module, path, _Given(value)):
            try:
                module(*inputs)
            except _Seen as seen_last:
                return value, seen_last.value
    raise ValueError(f"alternating least squares: {last} does not run")
