"""A source of weights as a rule file would write it. No torch: an editor shows it too."""

from __future__ import annotations

from graftc.operators.spec import SITE, Const, InitSource, Part


def text(source: InitSource, binding: str = SITE) -> str:
    """The source as the rule file would write it; `binding` names the site that is replaced.

    >>> from graftc.operators.spec import Apply
    >>> text(Apply("concat", (Part("site", "q"), Part("a", "k"))), "b")
    'concat(b.q, a.k)'
    """
    if isinstance(source, Const):
        return str(source.value)
    if isinstance(source, Part):
        site = binding if source.site == SITE else source.site
        return site if source.name is None else f"{site}.{source.name}"
    options = [f"{k} = {text(v, binding)}" for k, v in source.options.items() if k != "otherwise"]
    inside = ", ".join([*(text(a, binding) for a in source.args), *options])
    return f"{source.policy}({inside})" if inside else source.policy
