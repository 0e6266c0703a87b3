"""Why a site has not the role that a rule asks for."""

from __future__ import annotations

from graftc.diagnostics import Span
from graftc.language.vocabulary import ATTENTION
from graftc.program.analysis import ATTENTION_ROLES, Site
from graftc.program.flat import Op
from graftc.program.ops import ACTIVATIONS, MOVEMENTS
from graftc.program.refusals import op_name
from graftc.program.roles import is_linear
from graftc.rewrite.whynot.change import Change, source_line
from graftc.rewrite.whynot.places import Places

_KINDS = {
    "self_attention": "q, k and v come from one stream",
    "cross_attention": "q comes from another stream than k and v",
    "joint_attention": "q, k and v come from two streams, both in both",
}


def role_change(role: str, site: Site, places: Places, span: Span) -> Change | None:
    """What keeps a site from having a role; None where it has it.

    A cost of 1 is near: an attention of another kind, or ops that look like the role. 4 is another thing altogether.
    """
    wanted = ATTENTION_ROLES if role == "attention" else (role,)
    if site.role in wanted:
        return None
    fix = f'name the module by path: `module "{site.path}"`'
    if role in ATTENTION and site.role in ATTENTION_ROLES:
        text = f"is {site.role}: {_KINDS[site.role]}; wanted {role}"
        return Change("role", 1.0, text, span, f"write `{site.role}`")
    kind = "attention" if role in ATTENTION else role
    refusal = places.refusal(kind, site.path)
    if refusal is not None:
        text = f"is no {role}: {refusal.reason}"
        return Change("role", 1.0, text, span, fix, source_line(refusal.op))
    if kind == "mlp" and site.role == "unknown" and (between := _between_linears(site, places)):
        text = f"is no mlp: {_why_no_mlp(between)}"
        return Change("role", 1.1, text, span, fix, source_line(between))
    found = "of no role that graftc knows" if site.role == "unknown" else site.role
    return Change("role", 4.0, f"is {found}, wanted {role}", span, fix)


def _why_no_mlp(between: Op) -> str:
    """What keeps the op between two linears from making them an MLP."""
    known = between.target in ACTIVATIONS
    if known and between.tensor is not None and between.tensor.ndim < 3:
        return (
            "it works on [batch, features], and the role is for tokens, [batch, tokens, features]"
        )
    what = "with other linears around it" if known else "no activation that graftc knows"
    return f"between its linears stands {op_name(between)}, {what}"


def _between_linears(site: Site, places: Places) -> Op | None:
    """The op between the two linears of a module, where there are no others."""
    inside = places.ops_of(site.path)
    linears = [o for o in inside if is_linear(o)]
    others = [o for o in inside if not is_linear(o) and o.target not in MOVEMENTS]
    if len(linears) < 2 or not others:
        return None
    return next((o for o in others if linears[0].index < o.index < linears[-1].index), None)
