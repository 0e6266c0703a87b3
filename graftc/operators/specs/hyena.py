"""Specs of the Hyena family (paper.md sections 3 and 4.1): gated short convolutions."""

from __future__ import annotations

from functools import partial

from graftc.operators.spec import (
    WHOLE,
    Apply,
    Arg,
    Arguments,
    Cost,
    Form,
    InitSource,
    OperatorSpec,
    Slot,
)
from graftc.operators.specs._common import (
    DIM,
    SELF_ATTENTION,
    by_rule,
    form_arg,
    grid_args,
    integer,
    on_gpu,
    otherwise,
    part,
    taps,
)

_ARGS = (
    DIM,
    Arg("kernel", "int", 4, minimum=1, doc="taps of each convolution"),
    Arg("causal", "bool", True, doc="taps on earlier tokens only; false centres them"),
    Arg("order", "int", 2, minimum=2, doc="how many gates; q is the last, k the first ones"),
    *grid_args(),
    form_arg("conv", "shifts", "causal_conv1d"),
)


def _along(arguments: Arguments) -> str | None:
    return None if arguments["dims"] == 1 else "it is along the tokens, and dims is 2"


def _kernel(arguments: Arguments) -> str | None:
    """What causal-conv1d takes: `causal_conv1d_fn` of 2 to 4 taps, channels side by side in eights."""
    if arguments["dims"] != 1 or not arguments["causal"]:
        return "causal-conv1d is causal, along the tokens"
    if integer(arguments, "kernel") not in (2, 3, 4):
        return f"causal-conv1d takes 2, 3 or 4 taps, found {arguments['kernel']}"
    return None if integer(arguments, "dim") % 8 == 0 else "causal-conv1d wants dim in eights"


def _forms(cls: str) -> tuple[Form, ...]:
    """On a CPU a convolution: shifted multiplies take 1.7 times as long in eager mode."""
    return (
        Form(
            "shifts",
            on_gpu("shifted multiplies, which torch.compile fuses with the gates into one kernel"),
            cannot=_along,
        ),
        Form(
            "causal_conv1d",
            by_rule,
            cannot=_kernel,
            module=f"graftc.operators.kernels:Kernel{cls}",
            package=("causal_conv1d", "causal-conv1d"),
        ),
        Form("conv", otherwise("a depthwise convolution")),
    )


def _rows(arguments: Arguments) -> tuple[int, ...]:
    """The rows of q, of k (and the other gates), and of v."""
    dim = integer(arguments, "dim")
    return dim, (integer(arguments, "order") - 1) * dim, dim


_PROJECTIONS = (
    Slot("in_proj", "in_proj", doc="rows q, k, v"),
    Slot("q", "in_proj", rows=(0, 3), sizes=_rows),
    Slot("k", "in_proj", rows=(1, 3), sizes=_rows),
    Slot("v", "in_proj", rows=(2, 3), sizes=_rows),
    Slot("out_proj", "out_proj", last=True),
    Slot("out", "out_proj", last=True, doc="the same as out_proj"),
)
_SHORT = (Slot("short_filter", "short_filter", doc="depthwise, on q, k and v"),)
_INNER = (Slot("inner_filter", "inner_filter", doc="depthwise, on k · v"),)


def _cost(arguments: Arguments, tokens: int, *, short: bool, inner: bool) -> Cost:
    dim, weights, order = integer(arguments, "dim"), taps(arguments), integer(arguments, "order")
    wide = (order + 1) * dim
    params = wide * (dim + 1) + dim * (dim + 1)
    operator, featuriser = order * tokens * dim, 2 * tokens * dim * (wide + dim)
    if short:
        params += wide * (weights + 1)
        featuriser += 2 * weights * wide * tokens
    if inner:
        params += dim * (weights + 1)
        operator += (order - 1) * 2 * weights * tokens * dim
    return Cost(params, operator, featuriser)


def _inits(*, short: bool, inner: bool) -> dict[str, dict[str, InitSource]]:
    """q = k = 1 at first, so that y = out(conv(v)); then every map is fitted (docs/first-weights.md)."""
    sources: dict[str, InitSource] = {"q": Apply("one"), "k": Apply("one"), "v": part("v")}
    if short:
        sources["short_filter"] = Apply("identity")
    if inner:
        sources["inner_filter"] = Apply("identity")
    sources["out_proj"] = part("out")
    return {SELF_ATTENTION: {**sources, WHOLE: Apply("least_squares")}}


def _linear(*, short: bool, inner: bool) -> tuple[Slot, ...]:
    """A product of q, k and v is linear in each, and in their filters; k as one only at order 2."""
    found: list[Slot] = []
    for index in (2, 1, 0):
        found.append(Slot("in_proj", "in_proj", rows=(index, 3), sizes=_rows))
        if short:
            found.append(Slot("short_filter", "short_filter", rows=(index, 3), sizes=_rows))
    if inner:  # of a higher order the filter is used more than once
        found.append(Slot("inner_filter", "inner_filter", when="order=2"))
    return tuple(found)


def _spec(name: str, cls: str, summary: str, *, short: bool, inner: bool) -> OperatorSpec:
    return OperatorSpec(
        name=name,
        module=f"graftc.operators.hyena:{cls}",
        summary=summary,
        roles=(SELF_ATTENTION,),
        mixes="tokens",
        args=_ARGS,
        slots=_PROJECTIONS + (_SHORT if short else ()) + (_INNER if inner else ()),
        inits=_inits(short=short, inner=inner),
        cost=partial(_cost, short=short, inner=inner),
        keeps=("causal",),
        length="dims=2",
        linear=_linear(short=short, inner=inner),
        forms=_forms(cls),
        source="Grafting (arXiv 2506.05340), table 3; Hyena-SE/X of StripedHyena 2",
    )


SPECS = (
    _spec(
        "hyena_x",
        "HyenaX",
        "out(q · (k · v)), a short convolution on q, k and v",
        short=True,
        inner=False,
    ),
    _spec(
        "hyena_y",
        "HyenaY",
        "out(q · conv(k · v))",
        short=False,
        inner=True,
    ),
    _spec(
        "hyena_se",
        "HyenaSE",
        "out(q · conv(k · v)), a short convolution on q, k and v",
        short=True,
        inner=True,
    ),
)
