"""An operator's arguments at a site: given in the rule, the site's own, or the signature's default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.diagnostics import Span, fail
from graftc.language.evaluate import evaluate
from graftc.language.rules import OperatorCall
from graftc.operators.spec import Arg, OfSite, OperatorSpec, Value, holds
from graftc.program.analysis import Site
from graftc.rewrite.facts import bound_fact
from graftc.rewrite.inputs import own_facts
from graftc.rewrite.match import Match


def resolve_arguments(
    call: OperatorCall, site: Site, match: Match, drop: tuple[str, ...] = ()
) -> dict[str, Value]:
    """All arguments of `call` at `site`, checked against the operator's spec; its form not yet chosen."""
    resolved: dict[str, Value] = {}
    facts = own_facts(site, drop)
    _check_known(call, site)
    for arg in call.spec.args:
        if not holds(arg.when, resolved):
            if arg.name in call.arguments:
                _not_here(arg, call, site)
            resolved[arg.name] = None
            continue
        implied = _implied(arg.name, call, site, resolved)
        if arg.name not in call.arguments and implied is not None:
            resolved[arg.name] = implied
        elif arg.name in call.arguments:
            value = evaluate(
                call.arguments[arg.name],
                lambda f: bound_fact(f, match.bindings),
            )
            resolved[arg.name] = _checked(
                arg, value, call.spec, call.arguments[arg.name].span, site
            )
        elif isinstance(arg.default, OfSite):
            fact = facts.get(arg.default.fact)
            if fact is None and arg.default.optional:
                resolved[arg.name] = arg.default.otherwise
                continue
            if fact is None:
                _check_from_model(arg.default.fact, call, site)
                fail(
                    "G351",
                    f"`{call.spec.name}` takes `{arg.name}` from the site, which has none",
                    span=call.span,
                    site=site.path,
                    wanted=arg.default.fact,
                    found=", ".join(sorted(site.facts)),
                    help=f"write `{call.spec.name}({arg.name} = …)`",
                )
            resolved[arg.name] = _checked(arg, fact, call.spec, call.span, site)
        else:
            resolved[arg.name] = arg.default
    return resolved


def _check_known(call: OperatorCall, site: Site) -> None:
    """An argument that the operator takes at other roles of site, and not at this one."""
    for name, value in call.arguments.items():
        if call.spec.arg(name) is None:
            fail(
                "G484",
                f"`{call.spec.name}` has no argument `{name}` at a {site.role}",
                span=value.span,
                site=site.path,
                wanted=", ".join(a.name for a in call.spec.args),
                found=name,
            )


def _not_here(arg: Arg, call: OperatorCall, site: Site) -> None:
    fail(
        "G485",
        f"`{arg.name}` of `{call.spec.name}` is for `{arg.when}`",
        span=call.arguments[arg.name].span,
        site=site.path,
        help=f"leave `{arg.name}` out",
    )


_FROM_MODEL = {
    "grid_height": ("the token grid", "grid = (rows, columns)"),
    "grid_width": ("the token grid", "grid = (rows, columns)"),
    "streams": (
        "the names of the streams",
        'streams = {"text": "the_input", "image": "the_input"}',
    ),
}


def _check_from_model(fact: str, call: OperatorCall, site: Site) -> None:
    """What graftc cannot see in a model, and its MODEL function must say."""
    if fact not in _FROM_MODEL:
        return
    what, argument = _FROM_MODEL[fact]
    tokens = site.facts.get("tokens")
    fail(
        "G482",
        f"`{call.spec.name}` needs {what} at {site.path}",
        span=call.span,
        site=site.path,
        wanted=f"graftc.Model(…, {argument})",
        found=f"a site of {tokens} tokens, of which nothing more is said",
    )


def _implied(
    name: str, call: OperatorCall, site: Site, resolved: Mapping[str, Value]
) -> int | None:
    """What `heads` alone implies: the same width in other heads; as many key-value heads where the site had so."""
    heads = resolved.get("heads")
    facts = [site.facts.get(n) for n in ("heads", "kv_heads", "head_dim")]
    if (
        "heads" not in call.arguments
        or not isinstance(heads, int)
        or not all(isinstance(f, int) for f in facts)
    ):
        return None
    before, kv_before, head_dim = (int(f) for f in facts)  # type: ignore[arg-type]
    if name == "kv_heads" and kv_before == before:
        return heads
    if name == "head_dim":
        if before * head_dim % heads:
            fail(
                "G352",
                f"`heads` of `{call.spec.name}` is {heads}",
                span=call.arguments["heads"].span,
                site=site.path,
                wanted=f"a divisor of the width {before * head_dim}",
                found=str(heads),
            )
        return before * head_dim // heads
    return None


def _checked(arg: Arg, value: Any, spec: OperatorSpec, span: Span, site: Site) -> Value:
    where = f"`{arg.name}` of `{spec.name}`"
    if arg.kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    kinds = {
        "int": int, "float": (int, float), "bool": bool, "symbol": str, "groups": str,
        "any": (int, float, bool, str),
    }[arg.kind]  # fmt: skip
    if not isinstance(value, kinds) or (arg.kind in ("int", "float") and isinstance(value, bool)):
        fail(
            "G352",
            f"{where} is {value!r}",
            span=span,
            site=site.path,
            wanted=arg.kind,
            found=repr(value),
        )
    if arg.choices and value not in arg.choices:
        fail(
            "G352",
            f"{where} cannot be `{value}`",
            span=span,
            site=site.path,
            wanted=", ".join(arg.choices),
            found=str(value),
        )
    if arg.minimum is not None and isinstance(value, (int, float)) and value < arg.minimum:
        fail(
            "G352",
            f"{where} is {value}",
            span=span,
            site=site.path,
            wanted=f"at least {arg.minimum:g}",
            found=str(value),
        )
    if arg.above is not None and isinstance(value, (int, float)) and value <= arg.above:
        fail(
            "G352",
            f"{where} is {value}",
            span=span,
            site=site.path,
            wanted=f"more than {arg.above:g}",
            found=str(value),
        )
    return value


def check_role(spec: OperatorSpec, site: Site, span: Span) -> None:
    """Raise where the operator is not for this role."""
    if site.role not in spec.roles:
        fail(
            "G350",
            f"`{spec.name}` cannot replace a {site.role}",
            span=span,
            site=site.path,
            wanted=" or ".join(spec.roles),
            found=site.role,
        )


def check_fits(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    site: Site,
    span: Span,
    drop: tuple[str, ...] = (),
) -> None:
    """Raise where the operator does not fit the site."""
    if "causal" in site.has and not spec.is_causal(arguments):
        fail(
            "G353",
            f"`{spec.name}` at {site.path} would see later tokens; the site is causal",
            span=span,
            site=site.path,
            wanted="a causal operator",
            found="causal = false"
            if spec.arg("causal")
            else f"`{spec.name}`, which cannot be causal",
            help="on a grid (`dims = 2`) its taps are centred: leave `dims` out, and write `causal = true`"
            if arguments.get("dims") == 2
            else f"write `{spec.name}(…, causal = true)`"
            if spec.arg("causal")
            else "choose a causal operator",
        )
    if (
        spec.mixes == "tokens"
        and site.facts.get("tokens_first") is True
        and arguments.get("tokens_first") is not True
    ):
        fail(
            "G364",
            f"{site.path} has its tokens before its batch, and `{spec.name}` mixes the second dimension",
            span=span,
            site=site.path,
            wanted="[batch, tokens, features]",
            found="[tokens, batch, features]",
            help="keep the attention there (`except {…}`), or build the model with `batch_first=True`",
        )
    _check_qk(spec, arguments, site, drop, span)
    if spec.mixes == "tokens" and arguments.get("window") is not None:
        tokens, window = site.facts.get("tokens"), arguments["window"]
        if isinstance(tokens, int) and isinstance(window, int) and window >= tokens:
            fail(
                "G355",
                f"window = {window} covers all {tokens} tokens of {site.path}",
                span=span,
                site=site.path,
                wanted=f"less than {tokens}",
                found=str(window),
                help="keep the attention, or narrow the window",
            )


def _check_qk(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    site: Site,
    drop: tuple[str, ...],
    span: Span,
) -> None:
    """Raise where an operator with q and k of its own would make them otherwise than the site did, unsaid."""
    if spec.arg("heads") is None:
        return
    _check_softcap(spec, arguments, site, drop, span)
    unread = site.facts.get("unread")
    if "qk_norm" in site.has:
        if "qk_norm" in drop or arguments.get("qk_norm", "none") != "none":
            return
        fail(
            "G354",
            f"`{spec.name}` would drop the norms of q and k at {site.path}",
            span=span,
            site=site.path,
            wanted="a root mean square or layer norm, of each head or of all together"
            if unread
            else None,
            found=f"q or k through {unread}" if unread else None,
            help="write `drop qk_norm` in the rule if that is meant",
        )
    if unread is not None and "rotary" not in site.has and site.facts.get("form") == "softmax":
        fail(
            "G363",
            f"q or k of {site.path} goes through {unread}, which `{spec.name}` does not do",
            span=span,
            site=site.path,
            wanted="a linear map, a norm, rotary positions and a factor, nothing else",
            help="keep the attention there (`except {…}`), or choose an operator without heads",
        )


def _check_softcap(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    site: Site,
    drop: tuple[str, ...],
    span: Span,
) -> None:
    """Raise where an operator with heads would leave out the cap of the scores, unsaid."""
    if "softcap" not in site.has or "softcap" in drop or arguments.get("softcap") is not None:
        return
    unknown = site.facts.get("softcap") is None
    fail(
        "G354",
        f"`{spec.name}` would drop the cap of the scores at {site.path}",
        span=span,
        site=site.path,
        wanted="cap · tanh(scores / cap), before every mask" if unknown else None,
        found="a tanh of the scores in another form"
        if unknown
        else f"softcap = {site.facts['softcap']:g}",
        help="write `drop softcap` in the rule if that is meant",
    )
