"""Hover: what a word means, as Markdown."""

from __future__ import annotations

from graftc.editor.keywords import DOCS
from graftc.editor.meaning import STRUCTURE, Meaning
from graftc.editor.page import Page
from graftc.language import syntax as s
from graftc.language.vocabulary import (
    DISTILL,
    DROPS,
    FACTS,
    FINETUNE,
    POLICIES,
    FactWord,
)
from graftc.operators.source_text import text as source_text
from graftc.operators.spec import Apply, Arg, OfSite, OperatorSpec
from graftc.operators.specs import MERGES, SPECS

_ROLE_DOCS = {
    "self_attention": "Attention whose queries, keys and values have one source.",
    "cross_attention": "Attention whose keys and values come from another stream.",
    "joint_attention": "Attention over two streams at once.",
    "attention": "Any attention: self, cross or joint.",
    "mlp": "An activation between two linears on a token stream, gated or not.",
    "norm": "A normalisation.",
    "linear": "A linear map.",
    "conv": "A convolution.",
    "embedding": "An embedding table.",
    "block": "A block of a chain; its output holds the residual stream.",
}
_PART_DOCS = {
    "q": "the affine map from the site's input to the queries",
    "k": "the affine map from the site's input to the keys",
    "v": "the affine map from the site's input to the values",
    "out": "the affine map behind the heads",
    "up": "the MLP's first map",
    "down": "the MLP's last map",
    "gate": "the MLP's gate",
    "norm": "the norm inside",
}
_LOSSES = {
    "l1": "mean absolute difference to the teacher's output",
    "l2": "mean squared difference to the teacher's output",
    "huber": "l2 where the difference is small, l1 beyond `delta`",
    "auto": "l1, l2 or huber, from the measured kurtosis of the teacher's output",
}


def signature(spec: OperatorSpec) -> str:
    """An operator with its arguments and their defaults, as a call.

    >>> signature(SPECS["hyena_x"])
    'hyena_x(dim = site, kernel = 4, causal = true, order = 2, dims = 1, height = site.grid_height, width = site.grid_width, form = auto)'
    """
    return f"{spec.name}({', '.join(argument_text(a) for a in spec.args)})"


def argument_text(arg: Arg) -> str:
    """`kernel = 4`; `site` where the default is the site's own; no default where one is required."""
    if arg.required:
        return arg.name
    default = arg.default
    if isinstance(default, OfSite):
        return f"{arg.name} = site" + ("" if default.fact == arg.name else f".{default.fact}")
    if isinstance(default, bool):
        return f"{arg.name} = {str(default).lower()}"
    return f"{arg.name} = {'none' if default is None else default}"


def operator_text(spec: OperatorSpec) -> str:
    """Signature, arguments, roles, default first weights and source of an operator."""
    lines = [f"```graft\n{signature(spec)}\n```", spec.summary, ""]
    lines += [f"- {_argument_line(a)}" for a in spec.args]
    lines += ["", f"replaces {', '.join(f'`{r}`' for r in spec.roles)}; mixes {spec.mixes}"]
    if spec.keeps:
        lines.append(f"keeps of the site: {', '.join(spec.keeps)}")
    for role, sources in spec.inits.items():
        if sources:
            starts = ", ".join(
                f"`{'whole' if k == '*' else k} = {_source(v)}`" for k, v in sources.items()
            )
            lines.append(f"\ndefault `init` for `{role}`: {starts}")
    if spec.source:
        lines.append(f"\n{spec.source}")
    return "\n".join(lines)


def _source(source: object) -> str:
    """A default, and what it starts from where it waits for data."""
    said = source_text(source)  # type: ignore[arg-type]
    if isinstance(source, Apply) and "otherwise" in source.options:
        said += f" (from {source_text(source.options['otherwise'])})"
    return said


def _argument_line(arg: Arg) -> str:
    limits = [f"one of {', '.join(arg.choices)}"] if arg.choices else []
    limits += [f"at least {arg.minimum:g}"] if arg.minimum is not None else []
    limits += [f"above {arg.above:g}"] if arg.above is not None else []
    limits += ["required"] if arg.required else []
    tail = f" ({', '.join(limits)})" if limits else ""
    return f"`{argument_text(arg)}`: {arg.kind}{tail}" + (f"; {arg.doc}" if arg.doc else "")


def fact_text(name: str, fact: FactWord) -> str:
    """A predicate of `where`: its call, type and the roles that have it."""
    options = "".join(f", {k} = {v}" for k, v in (fact.options or {}).items())
    of = ", ".join(f"`{r}`" for r in fact.roles) or "every site"
    tail = "; measured on data" if fact.measured else ""
    return f"```graft\n{name}(a{options})\n```\n{fact.type}: {fact.doc}\n\nof {of}{tail}"


def policy_text(name: str) -> str:
    """An init source: its call and what it gives."""
    policy = POLICIES[name]
    many = policy.most is None or policy.most > 1
    taken = ["x, …" if many else "x"] if policy.most != 0 else []
    taken += [policy.number] if policy.number else []
    taken += [f"{k} = {' | '.join(c) or t}" for k, (t, c) in (policy.options or {}).items()]
    call = f"{name}({', '.join(taken)})" if taken else name
    whole = "\n\nfills the whole operator; takes no slot" if policy.whole else ""
    return f"```graft\n{call}\n```\n{policy.doc}{whole}"


def hover(page: Page, meaning: Meaning) -> str | None:
    """The Markdown for a word, or None where there is nothing to say."""
    name, kind = meaning.name, meaning.kind
    if kind == "operator":
        return operator_text(SPECS[name])
    if kind == "merge":
        return operator_text(MERGES[name])
    if kind in ("written", "setting", "rule", "used"):
        return _written(page, meaning)
    if kind == "binding":
        bound = page.bindings(meaning.token.start)[name]
        return f"`{name}`: {bound.role or 'what the pattern matches'}" + (
            f"\n\n{_ROLE_DOCS[bound.role]}" if bound.role in _ROLE_DOCS else ""
        )
    if kind in ("argument", "slot"):
        return _of_operator(meaning)
    if kind == "option":
        word = (DISTILL if meaning.owner == "distill" else FINETUNE)[name]
        return f"`{name}`: {word.kind}; {word.doc}"
    words = {
        "keyword": DOCS.get(name),
        "role": f"role `{name}`\n\n{_ROLE_DOCS.get(name, '')}",
        "fact": fact_text(name, FACTS[name]) if name in FACTS else None,
        "policy": policy_text(name) if name in POLICIES else None,
        "loss": f"`{name}`: {_LOSSES.get(name, '')}",
        "drop": f"`{name}`: {DROPS.get(name, '')}",
        "part": f"`{meaning.owner}.{name}`: {_PART_DOCS.get(name, _ROLE_DOCS.get(name, ''))}",
        "structure": STRUCTURE.get(name),
    }
    return words.get(kind)


def _written(page: Page, meaning: Meaning) -> str | None:
    """What a `.graft` file defines: the line that defines it, and a rule's summary."""
    name = meaning.name
    tables: tuple[dict[str, s.SetItem | s.RuleItem | s.OperatorItem], ...] = (
        {**page.settings} if meaning.kind == "setting" else {},
        {**page.operators} if meaning.kind in ("written", "used") else {},
        {**page.rules} if meaning.kind in ("rule", "used") else {},
    )
    item = next((t[name] for t in tables if name in t), None)
    if item is None:
        return None
    head = item.span.source.line_text(item.span.line).strip()
    place = "" if item.span.source.name == page.source.name else f"\n\n{item.span}"
    summary = f"\n\n{item.summary}" if isinstance(item, s.RuleItem) and item.summary else ""
    return f"```graft\n{head}\n```{summary}{place}"


def _of_operator(meaning: Meaning) -> str | None:
    spec = SPECS.get(meaning.owner) or MERGES.get(meaning.owner)
    if spec is None:
        policy = POLICIES.get(meaning.owner)
        option = (policy.options or {}).get(meaning.name) if policy else None
        return f"`{meaning.name}`: {' | '.join(option[1]) or option[0]}" if option else None
    if meaning.kind == "argument":
        arg = spec.arg(meaning.name)
        return f"{_argument_line(arg)}\n\nof `{spec.name}`" if arg else None
    slot = spec.slot(meaning.name)
    if slot is None:
        return None
    starts = [f"`{_source(m[slot.name])}`" for m in spec.inits.values() if slot.name in m]
    default = f"\n\ndefault: {', '.join(starts)}" if starts else ""
    return f"slot `{slot.name}` of `{spec.name}`" + (f": {slot.doc}" if slot.doc else "") + default
