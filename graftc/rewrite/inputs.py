"""What an operator takes over from its site beside the stream: a context, a mask, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from graftc.diagnostics import Span, fail
from graftc.operators.spec import OperatorSpec, Value
from graftc.program.analysis import Site

NAMES = {"mask": "attention mask", "rotary": "rotary positions"}


def own_facts(site: Site, drop: tuple[str, ...]) -> dict[str, Value]:
    """The facts that a signature's `= site` reads: the site's own, and the form of its rotary positions."""
    rotary = site.kept.get("rotary")
    form = "none" if rotary is None or "rotary" in drop else rotary.form
    facts: dict[str, Value] = {**site.facts, "rotary": form}
    if "qk_norm" in drop or facts.get("qk_norm") == "other":
        facts["qk_norm"] = "none"
    if "softcap" in drop:
        facts.pop("softcap", None)
    return facts


def kept_inputs(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    site: Site,
    drop: tuple[str, ...],
    span: Span,
) -> dict[str, int]:
    """Parameter of the operator's forward → which argument of the site's call it takes.

    Raises GraftError where the operator would drop what the site had (G354), or wants what the
    site has not (G480, G481).
    """
    inputs: dict[str, int] = {}
    if "context" in spec.keeps:
        context = site.kept.get("context")
        if context is None:
            fail(
                "G480",
                f"`{spec.name}` needs the context of {site.path} as an input of its call",
                span=span,
                site=site.path,
                found="a context that is computed inside the site",
            )
        inputs["context"] = context.arguments[0]
    for what in NAMES:
        if what not in site.has and what not in site.kept:
            continue
        if spec.mixes != "tokens" or what in drop:
            continue
        kept = site.kept.get(what)
        keeps = what in spec.keeps or (what == "mask" and "key_mask" in spec.keeps)
        if not keeps or kept is None:
            _dropped(spec, site, what, span, keeps)
        if what == "rotary":
            if arguments.get("rotary") == "none":
                _dropped(spec, site, what, span, keeps=False)
            inputs |= dict(zip(("cos", "sin"), kept.arguments, strict=True))
        else:
            inputs["mask"] = kept.arguments[0]
    _check_rotary(spec, arguments, site, inputs, span)
    return inputs


def _dropped(spec: OperatorSpec, site: Site, what: str, span: Span, keeps: bool) -> NoReturn:
    fail(
        "G354",
        f"`{spec.name}` would drop the {NAMES[what]} of {site.path}",
        span=span,
        site=site.path,
        wanted=f"the {NAMES[what]} as an input of the site's call" if keeps else None,
        found="computed inside the site, or a constant of it" if keeps else None,
        help=f"write `drop {what}` in the rule if that is meant",
    )


def _check_rotary(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    site: Site,
    inputs: Mapping[str, int],
    span: Span,
) -> None:
    """`rotary = half` where the site has none, or has the other form."""
    form = arguments.get("rotary", "none")
    if form == "none":
        return
    kept = site.kept.get("rotary")
    found = kept.form if kept is not None and "cos" in inputs else "none"
    if form != found:
        fail(
            "G481",
            f"`rotary = {form}` of `{spec.name}` does not fit {site.path}",
            span=span,
            site=site.path,
            wanted=f"rotary = {found}",
            found=f"rotary = {form}",
            help="leave the argument out: the operator then takes the site's own",
        )


def check_mask(new: str, mask: tuple[object, ...], stream: tuple[object, ...], span: Span) -> None:
    """A mask of three dimensions must be one of each sample: of each head it would be read wrongly."""
    if len(mask) > 4 or (len(mask) == 3 and mask[0] not in (1, stream[0])):
        fail(
            "G483",
            f"the mask of {new} is not one that an operator can take",
            span=span,
            site=new,
            wanted="[batch, heads, queries, keys], or [batch, queries, keys]",
            found=f"[{', '.join(map(str, mask))}]",
            help="write `drop mask` in the rule if that is meant",
        )
