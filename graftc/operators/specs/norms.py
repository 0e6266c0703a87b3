"""Specs of the norms."""

from __future__ import annotations

from graftc.operators.spec import Apply, Arg, Arguments, Cost, OfSite, OperatorSpec, Slot
from graftc.operators.specs._common import DIM, NORM, integer, part


def _spec(name: str, cls: str, summary: str, vectors: int, source: str) -> OperatorSpec:
    def cost(arguments: Arguments, tokens: int) -> Cost:
        """Element-wise work is not counted."""
        return Cost(vectors * integer(arguments, "dim") if arguments["affine"] else 0, 0, 0)

    return OperatorSpec(
        name=name,
        module=f"graftc.operators.norms:{cls}",
        summary=summary,
        roles=(NORM,),
        mixes="channels",
        args=(
            DIM,
            Arg("eps", "float", OfSite("eps"), above=0, doc="added to the mean square"),
            Arg("affine", "bool", OfSite("affine"), doc="a scale of each feature"),
        ),
        slots=(Slot("norm", "", when="affine", doc="the scale (and shift)"),),
        inits={NORM: {"norm": Apply("copy", (part("norm"),))}},
        cost=cost,
        source=source,
    )


SPECS = (
    _spec("rms_norm", "RmsNorm", "divides by the root mean square", 1, "arXiv 1910.07467"),
    _spec(
        "layer_norm",
        "LayerNorm",
        "subtracts the mean, divides by the deviation",
        2,
        "arXiv 1607.06450",
    ),
)
