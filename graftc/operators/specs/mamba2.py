"""Spec of Mamba-2 (paper.md sections 3 and 4.1)."""

from __future__ import annotations

from graftc.operators.spec import Apply, Arg, Arguments, Cost, Form, OperatorSpec, Slot
from graftc.operators.specs._common import (
    DIM,
    SELF_ATTENTION,
    fitted,
    form_arg,
    integer,
    number,
    on_gpu,
    otherwise,
)


def sizes(arguments: Arguments) -> tuple[int, ...]:
    """The rows of z, x, B, C and dt in `in_proj`.

    >>> sizes({"dim": 1152, "expand": 2, "groups": 1, "state": 64, "head_dim": 16})
    (2304, 2304, 64, 64, 144)
    """
    inner = round(number(arguments, "expand") * integer(arguments, "dim"))
    shared = integer(arguments, "groups") * integer(arguments, "state")
    return inner, inner, shared, shared, inner // integer(arguments, "head_dim")


def _cost(arguments: Arguments, tokens: int) -> Cost:
    """2 FLOPs for each number of the state a token (paper, section H.1 as re-derived)."""
    dim, kernel = integer(arguments, "dim"), integer(arguments, "kernel")
    inner, _, shared, _, heads = sizes(arguments)
    directions = 1 if arguments["causal"] else 2
    mixed = inner + 2 * shared
    projections = dim * sum(sizes(arguments)) + inner * dim
    params = projections + directions * (mixed * (kernel + 1) + 3 * heads) + inner
    return Cost(
        params,
        directions * 2 * tokens * inner * integer(arguments, "state"),
        2 * tokens * projections + directions * 2 * kernel * mixed * tokens,
    )


_BACK = "causal=False"

SPECS = (
    OperatorSpec(
        name="mamba2",
        module="graftc.operators.mamba2:Mamba2",
        summary="a selective state space with one decay a head (SSD)",
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=(
            DIM,
            Arg("state", "int", 64, minimum=1, doc="numbers of state for each feature"),
            Arg("head_dim", "int", 64, minimum=1, doc="width of one head"),
            Arg("groups", "int", 1, minimum=1, doc="how many B and C there are"),
            Arg("expand", "float", 2, above=0, doc="inner width as a multiple of dim"),
            Arg("kernel", "int", 4, minimum=1, doc="taps of the convolution on x, B and C"),
            Arg("causal", "bool", True, doc="one scan; false adds one from the end"),
            form_arg("chunks", "mamba_ssm"),
        ),
        slots=(
            Slot("in_proj", "in_proj", doc="rows z, x, B, C, dt"),
            *(
                Slot(name, "in_proj", rows=(i, 5), sizes=sizes)
                for i, name in enumerate(("z", "x", "B", "C", "dt"))
            ),
            Slot("conv", "conv1d", doc="depthwise, on x, B and C"),
            Slot("conv_back", "conv1d_back", when=_BACK),
            *(Slot(name, "", parameter=name) for name in ("dt_bias", "A_log", "D")),
            *(
                Slot(f"{name}_back", "", parameter=f"{name}_back", when=_BACK)
                for name in ("dt_bias", "A_log", "D")
            ),
            Slot("norm", "norm"),
            Slot("out_proj", "out_proj", last=True),
            Slot("out", "out_proj", last=True, doc="the same as out_proj"),
        ),
        inits={
            SELF_ATTENTION: {
                **dict.fromkeys(
                    ("in_proj", "conv", "dt_bias", "A_log", "D", "norm"), Apply("random")
                ),
                **dict.fromkeys(
                    ("conv_back", "dt_bias_back", "A_log_back", "D_back"), Apply("random")
                ),
                "out_proj": fitted(Apply("random")),
            }
        },
        cost=_cost,
        keeps=("causal",),
        forms=(
            Form(
                "mamba_ssm",
                on_gpu("mamba-ssm's kernel, which agrees here"),
                module="graftc.operators.kernels:KernelMamba2",
                package=("mamba_ssm", "mamba-ssm"),
            ),
            Form("chunks", otherwise("products in chunks")),
        ),
        source="arXiv 2405.21060; Grafting (arXiv 2506.05340), table 3; mamba_ssm.Mamba2",
    ),
)
