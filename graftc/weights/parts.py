"""What the analysis of a site hands to the init policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """An effective affine map in nn.Linear layout.

    weight: [out, in] (a filter's is [channels, 1, taps]); bias: [out], None for zeros. The rows
    of q, k and v, and the columns of out, are head-major.
    """

    weight: Tensor
    bias: Tensor | None = None


SiteParts = Mapping[str, Affine]
"""The parts of a site by name: q, k, v, out of an attention; up, gate, down of an MLP."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention site; without its own number, as many kv_heads as heads."""

    heads: int
    kv_heads: int
    head_dim: int

    def of(self, part: str) -> int:
        """The heads that the rows of a part hold; `k_2` is the k of a second stream.

        >>> Heads(heads=8, kv_heads=2, head_dim=4).of("k_2")
        2
        """
        return self.kv_heads if part.partition("_")[0] in ("k", "v") else self.heads
