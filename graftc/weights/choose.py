"""Choosing the neurons of a narrower MLP by what they do on calibration inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from graftc.weights.fit import Block
from graftc.weights.parts import Affine, SiteParts
from graftc.weights.policies import activation_score, bias_of, keep_top, permute
from graftc.weights.solve import Batches, Solved, relative_error

PARTS = ("up", "gate")
"""The parts of an MLP whose rows are its neurons, in the order of the blocks that hold them."""


def solve_keep_top(
    module: nn.Module, last: str, blocks: Sequence[Block], mlp: SiteParts, batches: Batches
) -> Solved:
    """Keep the neurons of `mlp` that add most to its output on the inputs, in place: one choice for all maps.

    blocks: where the rows of `up` stand in `module`, and of `gate` where it has one; the Linear `last`
    is `down`. A neuron's score is the root of its mean squared activation, times the norm of its
    column of `down`. Every neuron of `mlp` is measured, so many at a time as the module has.
    With as many neurons as `mlp`, or more, nothing changes.

    >>> up, down = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2, 2)
    >>> mlp = {"up": Affine(up), "down": Affine(down)}
    >>> thin = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    >>> x = torch.rand(64, 2) * torch.tensor([0.1, 9.0])
    >>> _ = solve_keep_top(thin, "2", [Block("0", 0, 1)], mlp, [((x,), 2 * x)])
    >>> thin[0].weight
    Parameter containing:
    tensor([[0., 1.]], requires_grad=True)
    """
    names = PARTS[: len(blocks)]
    missing = [n for n in (*names, "down") if n not in mlp]
    if missing:
        raise ValueError(f"keep_top: the teacher's site has no affine {', '.join(missing)}")
    if "gate" in mlp and "gate" not in names:
        raise ValueError("keep_top: the teacher's site is gated, and the operator is not")
    width, have = blocks[0].stop - blocks[0].start, mlp["up"].weight.shape[0]
    before = relative_error(module, batches)
    if width >= have:
        return Solved(before, before, len(batches))
    energy = torch.zeros(have, dtype=torch.float64, device=mlp["up"].weight.device)
    with torch.no_grad():
        for start in range(0, have, width):
            at = torch.arange(min(start, have - width), min(start + width, have))
            for block, name in zip(blocks, names, strict=True):
                _fill(module, block, permute(mlp[name], at))
            energy[at] = _energy(module, last, batches).to(energy)
        chosen = keep_top(mlp, width, activation_score(energy, mlp["down"]))
        for block, name in zip(blocks, names, strict=True):
            _fill(module, block, chosen[name])
        _fill(module, Block(last, 0, chosen["down"].weight.shape[0]), chosen["down"])
    return Solved(before, relative_error(module, batches), len(batches))


def _fill(module: nn.Module, block: Block, value: Affine) -> None:
    owner = module.get_submodule(block.module)
    for name, parameter in owner.named_parameters(recurse=False):
        parameter[block.start : block.stop] = value.weight if name == "weight" else bias_of(value)


def _energy(module: nn.Module, last: str, batches: Batches) -> Tensor:
    """The mean square of each feature that `last` reads, over all rows."""
    total, rows = 0.0, 0
    for seen in _read(module, last, batches):
        flat = seen.flatten(0, -2).double()
        total, rows = total + flat.square().sum(0), rows + len(flat)
    if not isinstance(total, Tensor):
        raise ValueError("keep_top: no rows were given")
    return total / rows


def _read(module: nn.Module, last: str, batches: Batches) -> Iterator[Tensor]:
    """What `last` reads, batch by batch."""
    calls: list[Tensor] = []
    handle = module.get_submodule(last).register_forward_hook(
        lambda _, inputs, __: calls.append(inputs[0])
    )
    try:
        for inputs, _ in batches:
            calls.clear()
            module(*inputs)
            if len(calls) != 1:
                raise ValueError(f"keep_top: {last} ran {len(calls)} times, not once")
            yield calls[0]
    finally:
        handle.remove()
