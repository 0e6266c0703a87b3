"""What several families' specs share: site arguments, typed reading of arguments, q|k|v rows."""

from __future__ import annotations

from collections.abc import Callable

from graftc.operators.spec import (
    SITE,
    Apply,
    Arg,
    Arguments,
    Form,
    InitSource,
    Machine,
    OfSite,
    Part,
    Slot,
)

SELF_ATTENTION = "self_attention"
CROSS_ATTENTION = "cross_attention"
JOINT_ATTENTION = "joint_attention"
MLP = "mlp"
LINEAR = "linear"
NORM = "norm"

DIM = Arg("dim", "int", OfSite("dim"), minimum=1, doc="width of the residual stream")


def attention_args() -> tuple[Arg, ...]:
    """The arguments of every operator that has heads."""
    return (
        DIM,
        Arg("heads", "int", OfSite("heads"), minimum=1, doc="query heads"),
        Arg("kv_heads", "int", OfSite("kv_heads"), minimum=1, doc="key-value heads"),
        Arg("head_dim", "int", OfSite("head_dim"), minimum=1, doc="width of one head"),
        Arg("causal", "bool", OfSite("causal"), doc="a token sees only itself and earlier ones"),
    )


ROTARY = Arg(
    "rotary",
    "symbol",
    OfSite("rotary"),
    choices=("none", "half", "interleaved", "pairs"),
    doc="how the site's cos and sin turn q and k",
)

_NORMED = "qk_norm!=none"
QK_NORM = (
    Arg(
        "qk_norm",
        "symbol",
        OfSite("qk_norm", "none", optional=True),
        choices=("none", "rms_norm", "layer_norm"),
        doc="the norm of q and k",
    ),
    Arg(
        "norm_over",
        "symbol",
        OfSite("norm_over", "head", optional=True),
        choices=("head", "width"),
        when=_NORMED,
        doc="each head's features, or those of all heads together",
    ),
    Arg(
        "norm_eps",
        "float",
        OfSite("norm_eps", 1e-6, optional=True),
        minimum=0,
        when=_NORMED,
        doc="added to the mean square, or to the variance",
    ),
    Arg(
        "norm_affine",
        "bool",
        OfSite("norm_affine", True, optional=True),
        when=_NORMED,
        doc="a scale (and shift) of each feature",
    ),
)
"""The norms of q and k, the site's own."""

SCALE = Arg(
    "scale",
    "float",
    OfSite("scale", None, optional=True),
    above=0,
    doc="of the scores; 1 / √head_dim if not given and not the site's own",
)

SOFTCAP = Arg(
    "softcap",
    "float",
    OfSite("softcap", None, optional=True),
    above=0,
    doc="bounds the scores: softcap · tanh(scores / softcap); none if not given and not the site's own",
)


def norm_params(arguments: Arguments) -> int:
    """Parameters of the norms of q and k.

    >>> norm_params({"qk_norm": "layer_norm", "norm_affine": True, "norm_over": "head", "head_dim": 8})
    32
    """
    if not arguments.get("norm_affine"):
        return 0
    heads = (1, 1)
    if arguments.get("norm_over") == "width":
        own = integer(arguments, "heads")
        kv = arguments.get("kv_heads")
        heads = (own, kv if isinstance(kv, int) else own)
    vectors = 2 if arguments["qk_norm"] == "layer_norm" else 1
    return vectors * sum(heads) * integer(arguments, "head_dim")


def form_arg(*forms: str) -> Arg:
    """The argument that forces one of several forms of the same function."""
    return Arg(
        "form",
        "symbol",
        "auto",
        choices=("auto", *forms),
        doc="how it is computed; auto: by where the student is to run and how many tokens there are",
    )


def otherwise(why: str) -> Callable[[Arguments, Machine, int | None], str | None]:
    """A form that is taken wherever no earlier one is."""
    return lambda arguments, machine, tokens: why


def by_rule(arguments: Arguments, machine: Machine, tokens: int | None) -> str | None:
    """A form that is never taken unasked."""
    return None


def on_gpu(why: str) -> Callable[[Arguments, Machine, int | None], str | None]:
    """A form for torch on a GPU."""
    return lambda arguments, machine, tokens: (
        why if machine.device == "cuda" and machine.to == "torch" else None
    )


def flex_form(module: str) -> Form:
    """The form through FlexAttention."""
    return Form(
        "flex",
        on_gpu("FlexAttention, one kernel on a GPU"),
        cannot=lambda arguments: (
            None
            if integer(arguments, "head_dim") >= 16
            else f"FlexAttention wants a head_dim of at least 16, found {arguments['head_dim']}"
        ),
        module=f"graftc.operators.flex:{module}",
    )


def grid_args() -> tuple[Arg, ...]:
    """The arguments of an operator that has a form on a grid of tokens."""
    return (
        Arg("dims", "int", 1, minimum=1, doc="1: along the tokens; 2: over the token grid"),
        Arg("height", "int", OfSite("grid_height"), minimum=1, when="dims=2"),
        Arg("width", "int", OfSite("grid_width"), minimum=1, when="dims=2"),
    )


def taps(arguments: Arguments) -> int:
    """Weights of one channel's filter: `kernel`, or its square on a grid."""
    return integer(arguments, "kernel") ** integer(arguments, "dims")


def integer(arguments: Arguments, name: str) -> int:
    """The integer argument `name`.

    >>> integer({"dim": 8}, "dim")
    8
    """
    value = arguments[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, wanted an integer")
    return value


def number(arguments: Arguments, name: str) -> float:
    """The numeric argument `name` as a float."""
    value = arguments[name]
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, wanted a number")
    return float(value)


def attention_sizes(arguments: Arguments) -> tuple[int, int, int]:
    """The rows of q, k and v in `in_proj`.

    >>> attention_sizes({"heads": 4, "kv_heads": 2, "head_dim": 8})
    (32, 16, 16)
    """
    head_dim = integer(arguments, "head_dim")
    q = integer(arguments, "heads") * head_dim
    kv = integer(arguments, "kv_heads") * head_dim
    return q, kv, kv


def attention_projections(arguments: Arguments, tokens: int) -> tuple[int, int]:
    """(parameters, FLOPs) of `in_proj` and `out_proj`; 4D² + 4D and 8ND² where all heads are equal.

    >>> attention_projections({"dim": 1152, "heads": 16, "kv_heads": 16, "head_dim": 72}, 256)
    (5313024, 2717908992)
    """
    dim = integer(arguments, "dim")
    rows = sum(attention_sizes(arguments))
    inner = attention_sizes(arguments)[0]
    params = rows * (dim + 1) + dim * (inner + 1)
    return params, 2 * tokens * dim * (rows + inner)


def part(name: str) -> Part:
    """The site's own part `name`."""
    return Part(SITE, name)


def qkv() -> Apply:
    """The rows of `in_proj`: q, k, v of the site, in this order."""
    return Apply("concat", (part("q"), part("k"), part("v")))


def fitted(otherwise: InitSource) -> Apply:
    """Least squares on calibration inputs; `otherwise` is what it starts from without them."""
    return Apply("least_squares", options={"otherwise": otherwise})


def norm_slots(*names: str, when: str = "norm_affine") -> tuple[Slot, ...]:
    """The slots of the norms of q and k."""
    return tuple(Slot(name, name, when=when) for name in names)


def own_or_one(name: str) -> Apply:
    """The site's norm `name`; where it has none, a scale of one."""
    return Apply("either", (part(name), Apply("identity")))


QK_NORM_SLOTS = norm_slots("q_norm", "k_norm")
QK_NORM_INITS: dict[str, InitSource] = {n: own_or_one(n) for n in ("q_norm", "k_norm")}
