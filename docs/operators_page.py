"""docs/operators.md, from the operators' docstrings and specs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from graftc.operators.build import operator_class
from graftc.operators.source_text import text
from graftc.operators.spec import WHOLE, Arg, InitSource, OfSite, OperatorSpec
from graftc.operators.specs import MERGES, SPECS

_HEAD = """# The operators

Made from the docstrings in `graftc/operators/` and the specs beside them by `python docs/make.py`. How a rule names one, and what `init`
takes: [language.md](language.md). Where first weights should start, measured: [first-weights.md](first-weights.md). Speed against full
attention: [benchmarks/RESULTS.md](../benchmarks/RESULTS.md). Parameters and FLOPs of each at a site: `graftc plan`, whose formulas
reproduce table 4 of the paper (`tests/operators/test_specs.py`); each definition is tested against one that is written out densely or
token by token (`tests/operators/test_lengths.py`).

*Site's* as a default: the argument is the site's own. *Keeps*: what of a site the operator takes over: its mask (a *key mask* is one that
is the same for every query), rotary positions, causality, groups of heads that share keys, the context or second stream. What it does not
keep and the site has must be dropped by name (`drop mask`), else it is an error. In *first weights* `a` is the site.

What fits no operator here: an operator of your own in a few lines of the language, or a class of a Python file (language.md).

**Joint attention** (SD3, Flux) takes `attention` and `local_attention_2d` alone. There text reaches the image through the attention only. A
mixer of neighbours (Hyena, a window) on both streams put end to end would let it reach the first few image tokens and no others, and a
scan in one direction would let nothing reach the text; each would run, and lose what the prompt says. So these are refused (G124), with the
two that fit. Linear attention over both streams would be sound, and is not written yet. In `local_attention_2d` with `groups = {text: full, image: local}` the image is local and the text still sees, and is seen
by, all. A single-stream block of such a model is self-attention, and takes every mixer.
"""


def operators_page() -> str:
    """The whole page: every operator, then the merges."""
    parts = [_HEAD]
    for spec in SPECS.values():
        parts += _operator(spec)
    parts.append("## Merges of `parallel`\n")
    for name, spec in MERGES.items():
        parts += _operator(spec, f"### merge = {name}")
    return "\n".join(parts)


def _operator(spec: OperatorSpec, heading: str | None = None) -> Iterator[str]:
    yield (heading or f"## {spec.name}") + "\n"
    yield from _definition(spec)
    yield from _facts(spec)
    yield from _arguments(spec)
    for role, other in spec.variants.items():
        yield f"**At a {role}:**\n"
        yield from _definition(other)
        yield from _facts(other)
        yield from _arguments(other)


def _definition(spec: OperatorSpec) -> Iterator[str]:
    for paragraph in (inspect.getdoc(operator_class(spec)) or "").split("\n\n"):
        if not paragraph.lstrip().startswith(">>>"):
            yield " ".join(line.strip() for line in paragraph.splitlines()) + "\n"


def _facts(spec: OperatorSpec) -> Iterator[str]:
    own = [r for r in spec.roles if r not in spec.variants]
    yield f"- Replaces: {', '.join(own)}. Mixes {spec.mixes}. Keeps: {', '.join(spec.keeps).replace('_', ' ') or 'nothing'}."
    if spec.length != "free":
        when = "" if spec.length == "fixed" else f", with `{spec.length.replace('=', ' = ')}`"
        yield f"- Built for one number of tokens{when}."
    for role, sources in spec.inits.items():
        if sources:
            yield f"- First weights at a {role}: {_sources(sources)}."
    if spec.groups:
        yield "- Trainable groups: " + ", ".join(f"`{g}`" for g in spec.groups) + "."
    if spec.source:
        yield f"- Source: {spec.source}."
    yield ""


def _sources(sources: Mapping[str, InitSource]) -> str:
    whole = f"`{text(sources[WHOLE], 'a')}` of the whole, from " if WHOLE in sources else ""
    each = (f"`{n} = {text(s, 'a')}`" for n, s in sources.items() if n != WHOLE)
    return (whole + ", ".join(each)).removesuffix(" of the whole, from ")


def _arguments(spec: OperatorSpec) -> Iterator[str]:
    if not spec.args:
        return
    yield "| argument | default | what |"
    yield "|---|---|---|"
    for arg in spec.args:
        yield f"| `{arg.name}` | {_default(arg)} | {_what(arg)} |"
    yield ""


def _default(arg: Arg) -> str:
    if arg.required:
        return "must be given"
    if isinstance(arg.default, OfSite):
        return "site's"
    if isinstance(arg.default, bool):
        return str(arg.default).lower()
    return "none" if arg.default is None else str(arg.default)


def _what(arg: Arg) -> str:
    parts = [arg.doc] if arg.doc else []
    if arg.choices:
        parts.append(", ".join(f"`{c}`" for c in arg.choices))
    if arg.when:
        parts.append(f"with `{arg.when.replace('!=', ' ≠ ').replace('=', ' = ')}`")
    return "; ".join(parts)
