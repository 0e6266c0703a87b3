"""Filling an operator's arguments from a rule, the site, and the spec's defaults; no torch."""

from __future__ import annotations

from graftc.diagnostics import Span, fail, nearest
from graftc.operators.spec import Arg, Arguments, OfSite, OperatorSpec, Value


def resolve_arguments(
    spec: OperatorSpec,
    given: Arguments,
    facts: Arguments,
    *,
    site: str | None = None,
    span: Span | None = None,
) -> dict[str, Value]:
    """All of the spec's arguments: those `given`, else the site's own, else the default.

    `facts` are the site's (`dim`, `heads`, …). `head_dim` follows where `heads` was given, and
    `kv_heads` where `heads` was given and the site has as many of both. GraftError (G410…G413)
    for an unknown or missing argument, a fact the site does not have, a value out of range.

    >>> from graftc.operators.specs import SPECS
    >>> resolve_arguments(SPECS["hyena_x"], {}, {"dim": 8})
    {'dim': 8, 'kernel': 4, 'causal': True}
    """
    facts = _follow(given, facts)
    for name in given:
        if spec.arg(name) is None:
            names = [a.name for a in spec.args]
            near = nearest(name, names)
            fail(
                "G410",
                f"operator `{spec.name}` has no argument `{name}`",
                span=span,
                site=site,
                wanted=", ".join(names) or "no arguments",
                help=f"write `{near}`" if near else None,
            )
    resolved: dict[str, Value] = {}
    for arg in spec.args:
        if arg.name in given:
            resolved[arg.name] = check_value(spec, arg, given[arg.name], site=site, span=span)
        elif arg.required:
            fail(
                "G411",
                f"operator `{spec.name}` needs `{arg.name}`",
                span=span,
                site=site,
                help=f"write `{spec.name}({arg.name} = …)`",
            )
        elif isinstance(arg.default, OfSite):
            if facts.get(arg.default.fact) is None:
                fail(
                    "G412",
                    f"`{arg.name}` of `{spec.name}` is the site's own, and the site has none",
                    span=span,
                    site=site,
                    help=f"write `{spec.name}({arg.name} = …)`",
                )
            value = facts[arg.default.fact]
            resolved[arg.name] = check_value(spec, arg, value, site=site, span=span)
        else:
            resolved[arg.name] = arg.default
    return resolved


def _follow(given: Arguments, facts: Arguments) -> Arguments:
    """The site's facts, after `heads` was given another number: the inner width stays."""
    heads, site_heads = given.get("heads"), facts.get("heads")
    head_dim = facts.get("head_dim")
    if not isinstance(heads, int) or not isinstance(site_heads, int) or heads == site_heads:
        return facts
    followed = dict(facts)
    if isinstance(head_dim, int) and heads > 0 and (site_heads * head_dim) % heads == 0:
        followed["head_dim"] = site_heads * head_dim // heads
    if facts.get("kv_heads") == site_heads:
        followed["kv_heads"] = heads
    return followed


def check_value(
    spec: OperatorSpec,
    arg: Arg,
    value: Value,
    *,
    site: str | None = None,
    span: Span | None = None,
) -> Value:
    """`value` as the argument takes it (a whole float becomes an int), or G413."""
    if arg.kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    kinds = {"int": int, "float": (int, float), "bool": bool, "symbol": str}[arg.kind]
    wanted: str | None = None
    if not isinstance(value, kinds) or (isinstance(value, bool) and arg.kind != "bool"):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(
            arg.kind, "a symbol"
        )
    elif arg.choices and value not in arg.choices:
        wanted = ", ".join(arg.choices)
    elif isinstance(value, (int, float)) and arg.minimum is not None and value < arg.minimum:
        wanted = f"at least {arg.minimum:g}"
    elif isinstance(value, (int, float)) and arg.above is not None and value <= arg.above:
        wanted = f"more than {arg.above:g}"
    if wanted is None:
        return value
    near = nearest(value, arg.choices) if isinstance(value, str) else None
    fail(
        "G413",
        f"`{arg.name}` of `{spec.name}` cannot be `{value}`",
        span=span,
        site=site,
        wanted=wanted,
        found=str(value),
        help=f"write `{near}`" if near else None,
    )
