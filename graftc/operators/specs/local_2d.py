"""Specs of attention inside a disc of the token grid: alone, and joint with another stream."""

from __future__ import annotations

from graftc.operators.spec import Arg, Arguments, Cost, Form, OfSite, OperatorSpec, Slot
from graftc.operators.specs._common import (
    DIM,
    JOINT_ATTENTION,
    QK_NORM,
    ROTARY,
    SCALE,
    SELF_ATTENTION,
    SOFTCAP,
    attention_args,
    attention_projections,
    attention_sizes,
    flex_form,
    form_arg,
    integer,
    norm_params,
    norm_slots,
    otherwise,
    own_or_one,
    part,
)
from graftc.operators.specs.attention import FITTED, LINEAR, SLOTS

_TILES = Form("tiles", otherwise("tiles of the grid, each with what its discs touch"))
_RADIUS = Arg("radius", "int", required=True, minimum=1, doc="tokens less than this away are seen")
_HEIGHT = Arg("height", "int", OfSite("grid_height"), minimum=1, doc="rows of the token grid")
_WIDTH = Arg("width", "int", OfSite("grid_width"), minimum=1, doc="columns of the token grid")


def pairs(height: int, width: int, radius: int) -> int:
    """How many (query, key) pairs lie less than `radius` apart on the grid.

    >>> pairs(2, 2, 1), pairs(2, 2, 2), pairs(2, 2, 9)
    (4, 16, 16)
    """
    reach = range(-radius + 1, radius)
    return sum(
        max(0, height - abs(dy)) * max(0, width - abs(dx))
        for dy in reach
        for dx in reach
        if dy * dy + dx * dx < radius * radius
    )


def _scores(arguments: Arguments) -> tuple[int, int]:
    """(pairs on the grid, tokens of the grid)."""
    height, width = integer(arguments, "height"), integer(arguments, "width")
    return pairs(height, width, integer(arguments, "radius")), height * width


def _cost(arguments: Arguments, tokens: int) -> Cost:
    """Without `groups` every token is on the grid; with them the others see all, and all see them."""
    scores, grid = _scores(arguments)
    beside = arguments.get("groups") is not None
    all_tokens = tokens if beside else grid
    params, projections = attention_projections(arguments, all_tokens)
    if beside:
        scores = tokens * tokens + (scores - grid * grid)
    operator = scores * (integer(arguments, "heads") * (4 * integer(arguments, "head_dim") + 2))
    return Cost(params + norm_params(arguments), operator, projections)


def _joint_cost(arguments: Arguments, tokens: int) -> Cost:
    """The other stream's tokens are what is not on the grid (facts of the site)."""
    scores, grid = _scores(arguments)
    counts = [n for n in (tokens, arguments.get("context_tokens")) if isinstance(n, int)]
    others = next((n for n in counts if n != grid), grid)
    heads, head_dim = integer(arguments, "heads"), integer(arguments, "head_dim")
    dim, context = integer(arguments, "dim"), integer(arguments, "context_dim")
    rows, inner = sum(attention_sizes(arguments)), heads * head_dim
    both = 1 if arguments["both"] else 0
    params = rows * (dim + 1 + context + 1) + dim * (inner + 1) + both * context * (inner + 1)
    params += 2 * norm_params(arguments)
    scores += grid * others + others * (grid + others)
    first, second = (grid, others) if counts and counts[0] == grid else (others, grid)
    featuriser = 2 * first * dim * (rows + inner) + 2 * second * context * (rows + both * inner)
    return Cost(params, scores * heads * (4 * head_dim + 2), featuriser)


_NAMES = ("q", "k", "v")
_JOINT = OperatorSpec(
    name="local_attention_2d",
    module="graftc.operators.local_2d:JointLocalAttention2d",
    summary="attention inside a disc of the token grid, joint with another stream",
    roles=(JOINT_ATTENTION,),
    mixes="tokens",
    args=(
        _RADIUS,
        Arg("groups", "groups", required=True, doc="of each stream, `full` or `local`"),
        DIM,
        Arg(
            "context_dim", "int", OfSite("context_dim"), minimum=1, doc="width of the other stream"
        ),
        *(a for a in attention_args() if a.name in ("heads", "kv_heads", "head_dim")),
        _HEIGHT,
        _WIDTH,
        Arg("streams", "symbol", OfSite("streams"), doc="the streams' names, the first one first"),
        Arg("both", "bool", OfSite("both"), doc="the second stream is an output as well"),
        Arg(
            "first",
            "symbol",
            OfSite("first_stream"),
            doc="whose tokens come first in the attention",
        ),
        *QK_NORM,
        SCALE,
        SOFTCAP,
        ROTARY,
        form_arg("tiles", "flex"),
    ),
    slots=(
        *(
            Slot(f"{n}_{stream}", path, rows=(i, 3), sizes=attention_sizes)
            for stream, path in ((1, "in_proj"), (2, "in_proj_2"))
            for i, n in enumerate(_NAMES)
        ),
        *norm_slots("q_norm", "k_norm", "q_norm_2", "k_norm_2"),
        Slot("out_1", "out_proj", last=True),
        Slot("out_2", "out_proj_2", when="both"),
    ),
    inits={
        JOINT_ATTENTION: {
            **{f"{n}_{s}": part(f"{n}_{s}") for n in (*_NAMES, "out") for s in (1, 2)},
            **{f"{n}_norm": own_or_one(f"{n}_norm_1") for n in ("q", "k")},
            **{f"{n}_norm_2": own_or_one(f"{n}_norm_2") for n in ("q", "k")},
        }
    },
    cost=_joint_cost,
    keeps=("mask", "rotary", "groups", "context"),
    length="fixed",
    forms=(flex_form("FlexJointLocalAttention2d"), _TILES),
    source="CLEAR, arXiv 2412.16112",
)

SPECS = (
    OperatorSpec(
        name="local_attention_2d",
        module="graftc.operators.local_2d:LocalAttention2d",
        summary="attention inside a disc of the token grid",
        roles=(SELF_ATTENTION, JOINT_ATTENTION),
        mixes="tokens",
        args=(
            _RADIUS,
            Arg(
                "groups",
                "groups",
                doc="of the tokens in their order, which are on the grid (`local`) and which see all (`full`)",
            ),
            *(a for a in attention_args() if a.name != "causal"),
            _HEIGHT,
            _WIDTH,
            ROTARY,
            *QK_NORM,
            SCALE,
            SOFTCAP,
            form_arg("tiles", "flex"),
        ),
        slots=SLOTS,
        inits=FITTED,
        cost=_cost,
        keeps=("mask", "rotary", "groups"),
        linear=LINEAR,
        length="groups=None",
        forms=(flex_form("FlexLocalAttention2d"), _TILES),
        source="CLEAR, arXiv 2412.16112",
        variants={JOINT_ATTENTION: _JOINT},
    ),
)
