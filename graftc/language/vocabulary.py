"""The words of the language that are not grammar: roles, facts, init policies, options.

They are data, so that `check`, completion and hover in an editor, and docs/language.md agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Type = Literal["int", "float", "bool", "symbol", "text"]

ATTENTION = ("self_attention", "cross_attention", "joint_attention", "attention")
ROLES = (*ATTENTION, "mlp", "norm", "linear", "conv", "embedding", "block")

HOLDS: Mapping[str, tuple[str, ...]] = {
    "block": tuple(r for r in ROLES if r != "block"),
    "mlp": ("linear", "norm", "conv", "mlp"),
    **dict.fromkeys(ATTENTION, ("linear", "norm", "conv", "embedding")),
}
"""Role → the roles that can lie inside a site of it."""

_MAPS = ("q", "k", "v", "out", "q_norm", "k_norm")
_OF_STREAMS = tuple(f"{name}_{stream}" for stream in (1, 2) for name in _MAPS)
_ATTENTION_PARTS = (*_MAPS, "norm")

PARTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(ATTENTION, _ATTENTION_PARTS),
    "joint_attention": (*_ATTENTION_PARTS, *_OF_STREAMS),
    "attention": (*_ATTENTION_PARTS, *_OF_STREAMS),
    "mlp": ("up", "down", "gate", "norm"),
}
"""Role → the parts of its sites that are affine maps (`a.q`; of a joint attention's second stream `a.q_2`)."""

ALL_PARTS = (*_MAPS, "up", "down", "gate", "norm", *_OF_STREAMS)
BLOCK_PARTS = (*ATTENTION, "mlp", "norm")
"""What `b.…` can name inside a block."""


def covers(wide: str, narrow: str) -> bool:
    """Whether a site of role `narrow` can be one of role `wide`.

    >>> covers("attention", "self_attention"), covers("self_attention", "mlp")
    (True, False)
    """
    return wide == narrow or (wide == "attention" and narrow in ATTENTION)


def may_be(one: str, other: str) -> bool:
    """Whether one site can have both roles."""
    return covers(one, other) or covers(other, one)


@dataclass(frozen=True)
class FactWord:
    """A predicate of `where`: what it gives, of which roles (empty: of all), its options.

    `measured`: it needs data; `required`: options that must be given.
    """

    type: Type
    doc: str
    roles: tuple[str, ...] = ()
    options: Mapping[str, Type] | None = None
    choices: tuple[str, ...] = ()
    measured: bool = False
    required: tuple[str, ...] = ()


KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(ATTENTION, ("self", "cross", "joint")),
    "norm": ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"),
    "mlp": ("plain", "gated"),
}
"""What `kind(x)` can be, for the roles that have kinds."""

ACTIVATIONS = (
    *("gelu", "gelu_tanh", "silu", "relu", "quick_gelu", "relu_squared", "tanh", "sigmoid"),
    *("leaky_relu", "elu", "mish", "softplus", "other"),
)
"""What `activation(m)` can be: the formulas that capture tells apart, and `other` for any that it does not know."""
DTYPES = (
    *("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "bool"),
    *("int64", "int32", "int16", "int8", "uint8", "complex64", "complex128"),
)

_FEATURES = ("linear", "conv", "embedding")
_MEASURED = (*ATTENTION, "mlp", "block")

FACTS: Mapping[str, FactWord] = {
    "dim": FactWord("int", "width of the residual stream"),
    "tokens": FactWord("int", "tokens that the site sees at once"),
    "params": FactWord("int", "parameters"),
    "flops": FactWord("int", "FLOPs of one forward pass of one sample"),
    "count": FactWord("int", "how often the site is called in one forward pass"),
    "heads": FactWord("int", "query heads", ATTENTION),
    "kv_heads": FactWord("int", "key-value heads", ATTENTION),
    "head_dim": FactWord("int", "width of one head", ATTENTION),
    "causal": FactWord("bool", "a token sees only itself and earlier ones", ATTENTION),
    "kind": FactWord("symbol", "which kind of its role", tuple(KINDS)),
    "affine": FactWord("bool", "the norm has scale or shift", ("norm",)),
    "eps": FactWord("float", "the norm's epsilon", ("norm",)),
    "in_features": FactWord("int", "width in", _FEATURES),
    "out_features": FactWord("int", "width out", _FEATURES),
    "ratio": FactWord("float", "neurons of the MLP as a multiple of dim", ("mlp",)),
    "hidden": FactWord("int", "neurons of the MLP", ("mlp",)),
    "activation": FactWord("symbol", "the MLP's activation", ("mlp",), choices=ACTIVATIONS),
    "gated": FactWord("bool", "the MLP has a gate", ("mlp",)),
    "dtype": FactWord("symbol", "element type of the weights", choices=DTYPES),
    "locality": FactWord(
        "float",
        "share of attention mass within |i - j| <= band, over heads and samples",
        ("self_attention", "joint_attention"),
        {"band": "int"},
        measured=True,
        required=("band",),
    ),
    "influence": FactWord(
        "float",
        "1 - cosine similarity of a block's input and output stream, over tokens",
        ("block",),
        measured=True,
    ),
    "mean": FactWord("float", "mean of all elements of the output", _MEASURED, measured=True),
    "std": FactWord(
        "float", "standard deviation of all elements of the output", _MEASURED, measured=True
    ),
    "absmax": FactWord("float", "largest absolute value in the output", _MEASURED, measured=True),
    "kurtosis": FactWord(
        "float",
        "E[(x - mean)^4] / std^4 of the output: 3 if normal, more with outliers",
        _MEASURED,
        measured=True,
    ),
}

FUNCTIONS = ("min", "max")


@dataclass(frozen=True)
class Policy:
    """A source of weights: how many sources it takes, and its options (name → kind, choices).

    `number`: its one positional argument is a number, not a source.
    """

    doc: str
    least: int = 0
    most: int | None = 0
    options: Mapping[str, tuple[Type, tuple[str, ...]]] | None = None
    required: tuple[str, ...] = ()
    number: str | None = None
    whole: bool = False


POLICIES: Mapping[str, Policy] = {
    "copy": Policy("the source as it is", 1, 1),
    "concat": Policy("the sources' rows, one after the other", 1, None),
    "slice": Policy(
        "columns first..last of the source",
        1,
        1,
        {"first": ("int", ()), "last": ("int", ())},
        ("first", "last"),
    ),
    "rows": Policy(
        "rows first..last of the source",
        1,
        1,
        {"first": ("int", ()), "last": ("int", ())},
        ("first", "last"),
    ),
    "mean_pool": Policy(
        "the mean over groups of heads", 1, 1, {"groups": ("int", ())}, ("groups",)
    ),
    "repeat": Policy("the source's rows, several times", 1, 1, {"times": ("int", ())}, ("times",)),
    "svd": Policy(
        "the best product of the operator's rank",
        1,
        1,
        {"whiten": ("symbol", ("calibration", "none")), "rank": ("int", ())},
        whole=True,
    ),
    "product": Policy("the product of two maps, the second applied first", 2, 2),
    "identity": Policy("the map that gives its input back"),
    "zero": Policy("zeros, biases included"),
    "one": Policy("the map that gives 1 whatever it is given: weight 0, bias 1"),
    "random": Policy("the module's own default, seeded", number="seed"),
    "keep_top": Policy(
        "the neurons that score highest; one choice for up, gate and down",
        1,
        1,
        {"by": ("symbol", ("magnitude", "activation"))},
        whole=True,
    ),
    "resize": Policy(
        "keep_top where it gets narrower; copy and zeros where wider",
        1,
        1,
        {"by": ("symbol", ("magnitude", "activation"))},
        whole=True,
    ),
    "fold": Policy("a norm's scale and shift, moved into what reads it", 1, 1, whole=True),
    "least_squares": Policy(
        "fitted on the teacher's activations, needs data; without a slot, all maps in turn",
        options={"sweeps": ("int", ())},
        whole=True,
    ),
}


@dataclass(frozen=True)
class OptionWord:
    """An option of `distill` or `finetune`: its kind and range (`low` excluded if `above`)."""

    kind: Literal["int", "float", "percent", "counts", "word", "train", "bool", "inputs"]
    field: str
    low: float = 0
    high: float = 1e12
    above: bool = False
    doc: str = ""


LOSSES = ("l1", "l2", "huber", "auto")

_SHARED: Mapping[str, OptionWord] = {
    "samples": OptionWord("int", "samples", 1, doc="samples that are drawn from DATA"),
    "epochs": OptionWord("int", "epochs", 1, doc="passes over them"),
    "steps": OptionWord("int", "steps", 1, doc="optimiser steps"),
    "batch": OptionWord("int", "batch", 1, 1e6, doc="samples of one step"),
    "lr": OptionWord("float", "lr", 0, 1, above=True, doc="learning rate"),
    "data": OptionWord("percent", "data_fraction", 0, 1, above=True, doc="a seeded share of DATA"),
}
DISTILL: Mapping[str, OptionWord] = {
    **_SHARED,
    "weight": OptionWord("float", "weight", 0, above=True, doc="scales it against other rules"),
    "delta": OptionWord("float", "delta", 0, above=True, doc="where huber turns from l2 to l1"),
    "train": OptionWord("word", "train", doc="a group of the operator's parameters"),
    "gate": OptionWord("bool", "gate", doc="weight by the gate that follows the site (adaLN)"),
    "mask_above": OptionWord(
        "float", "mask_above", 0, above=True, doc="leave out targets above so many rms"
    ),
    "inputs": OptionWord("inputs", "inputs", doc="`teacher`, `student` or `mix(0%, 100%)`"),
    "clip": OptionWord("float", "clip", 0, above=True, doc="largest norm of a site's gradient"),
    "patience": OptionWord(
        "int", "patience", 1, 1e6, doc="validations without a better one before a site stops"
    ),
}
FINETUNE: Mapping[str, OptionWord] = {
    **_SHARED,
    "warmup": OptionWord("int", "warmup", 0, doc="steps over which the learning rate rises"),
    "ema": OptionWord("float", "ema", 0, 0.9999999, doc="decay of the averaged weights"),
    "clip": OptionWord("float", "clip", 0, above=True, doc="largest norm of the gradient"),
    "halve_lr_at": OptionWord("counts", "halve_lr_at", 1, doc="steps at which lr halves"),
    "train": OptionWord("train", "train", doc="`all`, `inserted` or `lora(rank = …)`"),
    "task": OptionWord("float", "task", 0, doc="weight of the task's own loss"),
    "teacher": OptionWord("float", "teacher", 0, doc="weight of the teacher's output in the loss"),
    "features": OptionWord("float", "features", 0, doc="weight of the sites' outputs in the loss"),
    "precision": OptionWord("word", "precision", doc="`float32`, or `bfloat16` by autocast"),
    "checkpointing": OptionWord(
        "bool", "checkpointing", doc="blocks are computed again in the backward pass"
    ),
    "preview": OptionWord("int", "preview", 1, doc="steps between two sheets of samples"),
}

DROPS: Mapping[str, str] = {
    "mask": "a padding or additive mask",
    "rotary": "rotary positions",
    "qk_norm": "the norms of q and k",
    "softcap": "the cap of the scores",
}
TRAIN_WORDS = ("inserted",)
