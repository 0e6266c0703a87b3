"""The affine parts of a teacher's MLP, read from the region that its cut bounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graftc.program.analysis import analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.parts import PartRef, part_refs
from graftc.weights.parts import Affine


def mlp_parts(region: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Affine]:
    """up, down and, where it is gated, gate of the one MLP that `region` is, told from its dataflow.

    inputs: an example of what the region reads. Raises ValueError where it is no MLP alone.

    >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    >>> {n: list(p.weight.shape) for n, p in mlp_parts(mlp, [torch.zeros(2, 3, 4)]).items()}
    {'up': [8, 4], 'down': [4, 8]}
    """
    if len(inputs) != 1:
        raise ValueError(f"the teacher's site reads {len(inputs)} values, and an MLP reads one")
    example = inputs[0][:2].detach().clone()
    found = analyse(capture(Model(nn.Sequential(region), {"input": example})))
    sites = [s.path for s in found.sites if s.role == "mlp"]
    if len(sites) != 1:
        raise ValueError(f"the teacher's site holds {len(sites)} MLPs, not one")
    refs = part_refs(found, sites[0])
    with torch.no_grad():
        return {
            name: Affine(*ref.tensors(found.program))
            for name, ref in refs.items()
            if isinstance(ref, PartRef)
        }
