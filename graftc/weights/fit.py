"""What of an operator waits for calibration data, as plain data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SWEEPS = 2
"""How often alternating least squares goes over all maps. On the digits two more lower the model's output error by 3 to
8 %, and take as long again: `least_squares(sweeps = 4)`; docs/first-weights.md."""

WIDEST = 256
"""The widest operator whose maps are fitted in turn: each row has normal equations of its own, which
take width³ numbers and width passes. Beyond it the last map alone is fitted, and the plan says so."""


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` (end excluded) of a Linear or a depthwise filter, with their bias.

    Row start + c alone of these feeds channel c of what the operator's last map reads.
    """

    module: str
    start: int
    stop: int


@dataclass(frozen=True)
class Fit:
    """A solve on the teacher's activations.

    `least_squares` fits the Linear `linear`, the operator's last map; `alternating` fits `blocks`
    in turn, `sweeps` times over, and then that map. `svd` finds the best product of the one block, all
    of a Linear, and `linear` after it, on the inputs that it sees (whitened). `keep_top` chooses the
    neurons of `blocks` (the rows of up, and of gate) and of `linear` (down) by their activations.
    """

    policy: Literal["least_squares", "alternating", "svd", "keep_top"]
    linear: str
    blocks: tuple[Block, ...] = ()
    sweeps: int = 0
