"""Reading the sources of an `init` clause or of a spec: what they say, and what they give.

The policies, with `x`, `y` for sources (a part `a.q`, or another policy):
`copy(x)`, `concat(x, y, …)`, `rows(x, first = i, last = j)` and `slice` (columns; both ends in),
`mean_pool(a.k, groups = n)`, `repeat(a.k, times = n)`, `product(x, y)` (x after y), `identity`,
`zero`, `one`, `random(seed)`, `least_squares`;
for a whole operator `least_squares(sweeps = n)`, for a whole MLP `resize(m)`, `keep_top(m, by = magnitude | activation)`; for two
thin maps `svd(l, whiten = calibration)`; in specs only `argument(name)`, `either(part, other)`,
`constant(name)`, `svd_inner(x)` and `svd_outer(x)` (the two maps whose product is nearest to x, of the rank
that the operator has), `mean_of_branches`, `sum_of_branches`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from graftc.diagnostics import Span, fail, nearest
from graftc.operators.source_text import text
from graftc.operators.spec import SITE, Apply, Arguments, Const, InitSource, Part, Value
from graftc.weights import policies
from graftc.weights.fresh import fresh
from graftc.weights.parts import Affine, Heads, SiteParts

_PER_HEAD = ("mean_pool", "repeat")
WHOLE_POLICIES = ("resize", "keep_top", "svd")
POLICIES = (
    *(
        "copy",
        "concat",
        "rows",
        "slice",
        "mean_pool",
        "repeat",
        "product",
        "identity",
        "zero",
        "one",
    ),
    *("random", "least_squares", "argument", "constant", "mean_of_branches", "sum_of_branches"),
    *("svd_inner", "svd_outer"),
    *WHOLE_POLICIES,
)


@dataclass(frozen=True)
class Context:
    """What a source is read against: the operator and its site, for messages and for values.

    `known`: the names of the parts of each binding. `products`: the decompositions that were made.
    """

    operator: str
    arguments: Arguments
    path: str
    binding: str
    parts: Mapping[str, SiteParts]
    heads: Mapping[str, Heads]
    seed: int
    span: Span | None = None
    known: Mapping[str, Collection[str]] = field(default_factory=dict[str, Collection[str]])
    products: dict[tuple[str, int], tuple[Affine, Affine]] = field(
        default_factory=dict[tuple[str, int], tuple[Affine, Affine]], compare=False
    )

    def refuse(self, code: str, message: str, help: str | None = None) -> NoReturn:
        fail(code, message, span=self.span, site=self.path, help=help)

    def name(self, site: str) -> str:
        return self.binding if site == SITE else site


def pending(source: InitSource) -> bool:
    """Whether the source's last word needs calibration data."""
    return isinstance(source, Apply) and (
        source.policy == "least_squares" or any(pending(a) for a in source.args)
    )


def parts_of(source: InitSource) -> tuple[Part, ...]:
    """Every part that the source reads."""
    if isinstance(source, Part):
        return (source,)
    if isinstance(source, Const):
        return ()
    inside = (*source.args, *source.options.values())
    return tuple(part for x in inside for part in parts_of(x))


def unfold(source: InitSource, context: Context) -> InitSource:
    """What a spec's source stands for.

    `argument(name)`: the policy that the operator's argument names. `either(part, other)`: the part where
    the site has it.
    """
    if isinstance(source, Apply) and source.policy == "argument":
        return Apply(str(context.arguments[str(constant(source.args[0]))]))
    if isinstance(source, Apply) and source.policy == "either":
        own, other = source.args
        assert isinstance(own, Part)
        return own if own.name in context.known.get(context.name(own.site), ()) else other
    return source


def constant(source: InitSource) -> Value:
    """The number or word that the source is, if it is one."""
    return source.value if isinstance(source, Const) else None


def whole_number(context: Context, source: Apply, name: str, position: int) -> int:
    """An argument of a policy, by name or by position. Raises GraftError (G405) where it is no whole number."""
    given = source.options.get(name)
    if given is None and len(source.args) > position:
        given = source.args[position]
    value = constant(given) if given is not None else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        fail(
            "G405",
            f"`{source.policy}` needs a whole number `{name}`",
            span=context.span,
            site=context.path,
        )
    return value


def evaluate(
    source: InitSource, context: Context, submodule: nn.Module, path: str, repeats: bool = True
) -> Affine:
    """What the source gives for `submodule`, at `path` inside the operator.

    `repeats`: k and v of a site with fewer key-value heads than the operator are repeated.
    """
    if isinstance(source, Part):
        return _part(source, context, repeats)
    if isinstance(source, Const):
        fail(
            "G405",
            f"`{source.value}` is a number, and no source of weights",
            span=context.span,
            site=context.path,
        )
    if source.policy == "fold":  # the norm's own went into the maps that read it
        return Affine(torch.ones_like(submodule.get_parameter("weight").detach()), None)
    inner = [
        evaluate(a, context, submodule, path, repeats and source.policy not in _PER_HEAD)
        for a in source.args
        if not isinstance(a, Const)
    ]
    try:
        return _apply(source, inner, context, submodule, path)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(str(list(i.weight.shape)) for i in inner)
        fail(
            "G405",
            f"`{text(source, context.binding)}` cannot be computed: {error}",
            span=context.span,
            site=context.path,
            found=shapes or None,
        )


def _part(source: Part, context: Context, repeats: bool) -> Affine:
    binding = context.name(source.site)
    if binding not in context.parts:
        fail(
            "G403",
            f"`{binding}` is no site of this rule with weights to read",
            span=context.span,
            site=context.path,
        )
    if source.name is None:
        fail(
            "G405",
            f"`{binding}` is a whole site; this slot takes one of its parts",
            span=context.span,
            site=context.path,
            wanted=", ".join(f"{binding}.{n}" for n in context.parts[binding]),
        )
    found = context.parts[binding].get(source.name)
    if found is None:
        missing_part(binding, source.name, tuple(context.parts[binding]), context)
    heads = context.heads.get(binding)
    if not repeats or heads is None or source.name not in ("k", "v", "k_1", "v_1", "k_2", "v_2"):
        return found
    wanted = context.arguments.get("kv_heads", heads.heads)
    if isinstance(wanted, int) and wanted > heads.kv_heads and wanted % heads.kv_heads == 0:
        return policies.repeat(found, heads.kv_heads, wanted // heads.kv_heads)
    return found


def missing_part(binding: str, name: str, available: tuple[str, ...], context: Context) -> NoReturn:
    """G403: the site has no such part."""
    near = nearest(name, available)
    fail(
        "G403",
        f"the site `{binding}` has no part `{name}`, which init of `{context.operator}` reads",
        span=context.span,
        site=context.path,
        wanted=f"one of {', '.join(available)}" if available else None,
        help=f"write `{binding}.{near}`" if near else "give the slot another source in `init`",
    )


def _own(submodule: nn.Module) -> Affine:
    """What the submodule holds now."""
    held = {name: p.detach() for name, p in submodule.named_parameters()}
    return Affine(held["weight"], held.get("bias"))


def _identity(source: Apply, context: Context, submodule: nn.Module) -> Affine:
    if isinstance(submodule, nn.Conv1d):
        causal = constant(source.options.get("causal", Const(context.arguments.get("causal"))))
        return policies.dirac(submodule.out_channels, submodule.kernel_size[0], causal is True)
    if isinstance(submodule, nn.Conv2d):
        return policies.dirac2d(submodule.out_channels, submodule.kernel_size[0])
    if isinstance(submodule, (nn.RMSNorm, nn.LayerNorm)):
        return Affine(torch.ones_like(submodule.weight.detach()), None)
    if isinstance(submodule, nn.Linear):
        return policies.identity(submodule.out_features, submodule.in_features)
    raise ValueError(f"a {type(submodule).__name__} has no identity")


def _merge(context: Context, mean: bool) -> Affine:
    dim, branches = context.arguments["dim"], context.arguments["branches"]
    if not isinstance(dim, int) or not isinstance(branches, int):
        raise TypeError("dim and branches are whole numbers")
    return policies.branch_merge(dim, branches, 1 / branches if mean else 1.0)


def _per_head(source: Apply, inner: list[Affine], context: Context) -> Affine:
    part = source.args[0]
    if not isinstance(part, Part) or part.name is None:
        raise ValueError("it takes a part of a site, such as a.k")
    heads = context.heads.get(context.name(part.site))
    if heads is None:
        raise ValueError(f"the heads of {context.name(part.site)} are not known")
    count = heads.of(part.name)
    if source.policy == "repeat":
        return policies.repeat(inner[0], count, whole_number(context, source, "times", 1))
    return policies.mean_pool(inner[0], count, whole_number(context, source, "groups", 1))


def _nearest_product(
    source: Apply, whole: Affine, context: Context, submodule: nn.Module
) -> tuple[Affine, Affine]:
    """The two maps of `svd_inner` and `svd_outer`; `submodule` is the one that is filled."""
    weight = submodule.get_parameter("weight")
    rank = weight.shape[0 if source.policy == "svd_inner" else 1]
    rows, columns = whole.weight.shape
    if rank > min(rows, columns):
        raise ValueError(f"rank {rank} of a map of {columns} inputs and {rows} outputs")
    if whole.weight.is_meta:
        like = whole.weight.new_empty
        return Affine(like(rank, columns)), Affine(like(rows, rank), whole.bias)
    key = (text(source.args[0]), rank)
    if key not in context.products:  # both maps come from one decomposition
        context.products[key] = policies.svd(whole, rank)
    return context.products[key]


def _apply(
    source: Apply, inner: list[Affine], context: Context, submodule: nn.Module, path: str
) -> Affine:
    name = source.policy
    simple: dict[str, Callable[[], Affine]] = {
        "copy": lambda: policies.copy(inner[0]),
        "concat": lambda: policies.concat(inner),
        "product": lambda: policies.product(inner[0], inner[1]),
        "svd_inner": lambda: _nearest_product(source, inner[0], context, submodule)[0],
        "svd_outer": lambda: _nearest_product(source, inner[0], context, submodule)[1],
        "zero": lambda: policies.zero(_own(submodule)),
        "one": lambda: policies.one(_own(submodule)),
        "identity": lambda: _identity(source, context, submodule),
        "mean_of_branches": lambda: _merge(context, mean=True),
        "sum_of_branches": lambda: _merge(context, mean=False),
        "mean_pool": lambda: _per_head(source, inner, context),
        "repeat": lambda: _per_head(source, inner, context),
    }
    if name in simple:
        return simple[name]()
    if name in ("rows", "slice"):
        first = whole_number(context, source, "first", 1)
        last = whole_number(context, source, "last", 2)
        length = inner[0].weight.shape[0 if name == "rows" else 1]
        if not 0 <= first <= last < length:
            raise ValueError(f"{first} to {last} of {length}, counted from 0")
        cut = policies.rows if name == "rows" else policies.columns
        return cut(inner[0], first, last + 1)
    if name == "random":
        seeded = bool(source.args) or "seed" in source.options
        seed = whole_number(context, source, "seed", 0) if seeded else context.seed
        return fresh(submodule, seed, f"{context.path}.{path}")
    if name == "least_squares":
        otherwise = source.options.get("otherwise", Apply("zero"))
        return evaluate(otherwise, context, submodule, path)
    unknown_policy(name, context)


def unknown_policy(name: str, context: Context) -> NoReturn:
    """G405: no policy of this name gives a slot its weights."""
    near = nearest(name, POLICIES)
    fail(
        "G405",
        f"`{name}` is no init policy for a slot of `{context.operator}`",
        span=context.span,
        site=context.path,
        wanted=", ".join(p for p in POLICIES if p not in WHOLE_POLICIES),
        help=f"write `{near}`" if near and near != name else None,
    )
