"""A module's own default init, from a seed and a path."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import nn

from graftc.weights.parts import Affine


def seed_of(seed: int, path: str) -> int:
    """A generator's seed: the same for the same seed and path, unrelated for any other.

    >>> seed_of(0, "blocks.1") == seed_of(0, "blocks.2")
    False
    """
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fresh(module: nn.Module, seed: int, path: str) -> Affine:
    """What `module.reset_parameters()` gives it at `seed` and `path`; `module` stays as it is.

    Drawn on the CPU in float32, so that it is the same on every device and in every dtype. The
    global generator is left as it was.

    >>> a, b = (fresh(nn.Linear(2, 2), 0, "blocks.1") for _ in range(2))
    >>> torch.equal(a.weight, b.weight)
    True
    """
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise TypeError(f"{type(module).__name__} has no default init")
    meta = any(p.is_meta for p in module.parameters())
    made = copy.deepcopy(module)
    if not meta:
        made = made.to_empty(device="cpu").float()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(seed, path))
            made.reset_parameters()  # type: ignore[operator]
    state = dict(made.named_parameters())
    bias = state.get("bias")
    return Affine(state["weight"].detach(), None if bias is None else bias.detach())
