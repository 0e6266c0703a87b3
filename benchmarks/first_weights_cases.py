"""The operators and policies of `first_weights.py`: what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftc.distillation.optim import Kind
from graftc.operators.spec import SITE, Apply, Const, InitSource, Part

PLACES = {"mlp": "mlp", "mlp_hyena_x": "mlp", "low_rank": "mlp.fc1", "rms_norm": "norm1"}
"""What of a block is replaced, where it is not the attention."""

Clauses = list[tuple[str | None, InitSource]]


@dataclass(frozen=True)
class Case:
    """An operator, a policy for its first weights, and the optimiser that trains it then."""

    operator: str
    arguments: Mapping[str, Any]
    policy: str
    clauses: Clauses = field(default_factory=Clauses)
    optimiser: Kind = "muon"
    trained: bool = True

    @property
    def title(self) -> str:
        shown = ", ".join(f"{k} = {str(v).lower()}" for k, v in self.arguments.items())
        return f"{self.operator}({shown})"

    @property
    def key(self) -> str:
        return f"{self.title} | {self.policy}"


def part(name: str) -> Part:
    return Part(SITE, name)


FITTED: tuple[str, InitSource] = (
    "out_proj",
    Apply("least_squares", (), {"otherwise": part("out")}),
)
REUSED: Clauses = [("q", part("q")), ("k", part("k")), ("v", part("v"))]
OUT: tuple[str, InitSource] = ("out_proj", part("out"))
RANDOM: Clauses = [(None, Apply("random", (), {"seed": Const(0)}))]
ONES: Clauses = [("q", Apply("one")), ("k", Apply("one")), ("v", part("v"))]


CONSTANT = Case("constant", {}, "each token's mean", trained=False)
"""The control that looks at nothing."""


def cases() -> Iterator[Case]:
    """Most wanted first: a run that is stopped has measured what decides a default."""
    hyena: dict[str, Any] = {"kernel": 17, "causal": False}
    attention: tuple[tuple[str, dict[str, Any]], ...] = (
        ("sliding_window", {"window": 4}),
        ("linear_attention", {"feature": "relu"}),
        ("linear_attention", {"feature": "elu1"}),
        ("linear_attention", {"feature": "softmax_pair"}),
        ("linear_window_attention", {"window": 8}),
        ("local_attention_2d", {"radius": 3, "height": 8, "width": 8}),
    )
    hyenas = (
        ("hyena_x", hyena),
        ("hyena_x", {"kernel": 4, "causal": True}),
        ("hyena_y", hyena),
        ("hyena_se", hyena),
    )
    yield Case("token_linear", {}, "least squares", trained=False)
    yield CONSTANT
    for operator, arguments in hyenas[:1]:
        yield from _hyena(operator, arguments)
    for operator, arguments in attention[:2]:
        yield from _attention(operator, arguments)
    yield from _hyena(*hyenas[1])
    for ratio in (3, 6):
        yield Case("mlp", {"ratio": ratio}, "resized", trained=ratio < 4)
        if ratio < 4:
            fitted: tuple[str, InitSource] = ("down", Apply("least_squares"))
            yield Case("mlp", {"ratio": ratio}, "resized, down fitted", [fitted])
            by: InitSource = Apply("keep_top", (Part(SITE),), {"by": Const("activation")})
            yield Case("mlp", {"ratio": ratio}, "by activation", [(None, by)])
            yield Case("mlp", {"ratio": ratio}, "by activation, down fitted", [(None, by), fitted])
            yield Case("mlp", {"ratio": ratio}, "random", RANDOM)
            yield Case("mlp", {"ratio": ratio}, "random, AdamW", RANDOM, "adamw")
    for operator, arguments in attention[2:]:
        yield from _attention(operator, arguments)
    for operator, arguments in hyenas[2:]:
        yield from _hyena(operator, arguments)
    yield from _latent({"rank": 32})
    yield from _out_alone("mamba2", {"head_dim": 16, "causal": False})
    yield from _out_alone("mlp_hyena_x", {})
    yield Case("attention", {}, "reused", [*REUSED, OUT], trained=False)
    pooled = [*REUSED[:1], ("k", _pooled("k")), ("v", _pooled("v"))]
    for name, out in (("k and v pooled", OUT), ("k and v pooled, out fitted", FITTED)):
        yield Case("attention", {"kv_heads": 1}, name, [*pooled, out])
    yield from _random("attention", {"kv_heads": 1})
    filters: dict[str, Any] = {"kernel": 17}
    for name in ("identity", "zero"):
        yield Case("depthwise_conv", filters, name, [("filter", Apply(name))])
    yield from _random("depthwise_conv", filters)
    thin: dict[str, Any] = {"rank": 32}
    yield Case("low_rank", thin, "SVD", [(None, Apply("svd", (Part(SITE),)))])
    whitened = Apply("svd", (Part(SITE),), {"whiten": Const("calibration")})
    yield Case("low_rank", thin, "whitened SVD", [(None, whitened)])
    yield from _random("low_rank", thin)
    yield Case("rms_norm", {}, "the site's scale", trained=False)


def _hyena(operator: str, arguments: Mapping[str, Any]) -> Iterator[Case]:
    yield Case(operator, arguments, "all fitted in turn", [(None, Apply("least_squares"))])
    yield Case(operator, arguments, "random, AdamW", RANDOM, "adamw")
    yield Case(operator, arguments, "q, k, v reused, out fitted", [*REUSED, FITTED])
    yield Case(operator, arguments, "q = k = 1, out fitted", [*ONES, FITTED])
    yield Case(operator, arguments, "random", RANDOM)
    yield Case(operator, arguments, "q, k, v, out reused", [*REUSED, OUT])


def _attention(operator: str, arguments: Mapping[str, Any]) -> Iterator[Case]:
    yield Case(operator, arguments, "reused, v and out fitted", [(None, Apply("least_squares"))])
    yield Case(operator, arguments, "random, AdamW", RANDOM, "adamw")
    yield Case(operator, arguments, "q, k, v reused, out fitted", [*REUSED, FITTED])
    yield Case(operator, arguments, "q, k, v, out reused", [*REUSED, OUT])
    yield Case(operator, arguments, "random", RANDOM)


def _pooled(name: str) -> InitSource:
    return Apply("mean_pool", (part(name),), {"groups": Const(1)})


def _latent(arguments: Mapping[str, Any]) -> Iterator[Case]:
    operator, both = "latent_attention", Apply("concat", (part("k"), part("v")))
    nearest: Clauses = [
        ("q", part("q")),
        ("kv_down", Apply("svd_inner", (both,))),
        ("kv_up", Apply("svd_outer", (both,))),
    ]
    drawn: Clauses = [("q", part("q")), ("kv_down", RANDOM[0][1]), ("kv_up", RANDOM[0][1])]
    yield Case(
        operator,
        arguments,
        "SVD of k and v, then v and out fitted",
        [(None, Apply("least_squares"))],
    )
    yield Case(operator, arguments, "SVD of k and v", [*nearest, OUT])
    yield Case(operator, arguments, "SVD of k and v, out fitted", [*nearest, FITTED])
    yield Case(operator, arguments, "k and v random, out fitted", [*drawn, FITTED])
    yield from _random(operator, arguments)


def _out_alone(operator: str, arguments: Mapping[str, Any]) -> Iterator[Case]:
    """Where no map before the last is linear."""
    yield Case(operator, arguments, "random, out fitted", [("out_proj", Apply("least_squares"))])
    yield from _random(operator, arguments)


def _random(operator: str, arguments: Mapping[str, Any]) -> Iterator[Case]:
    yield Case(operator, arguments, "random, AdamW", RANDOM, "adamw")
    yield Case(operator, arguments, "random", RANDOM)
