"""docs/operators.md, from the operators' docstrings and specs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from graftc.operators.build import operator_class
from graftc.operators.source_text import text
from graftc.operators.spec import (
    CPU,
    WHOLE,
    Arg,
    Form,
    InitSource,
    Machine,
    OfSite,
    OperatorSpec,
)
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

## Forms
Some operators have several *forms*: formulations of the same function, with the same parameters, which agree to 1e-5 (tested). `graftc plan`
and `graftc compile` choose one at each site by where the student is to run and by the number of tokens, and print it with its reason; the plan
holds both. `--device cuda`, `--dtype bf16` and `--to onnx` (or `tensorrt`) say where; without them it is torch on a CPU in fp32. `form = …` in a
rule forces one.

A token all of whose keys a mask hides (padding) gets zeros before the output map in `sliding_window` and `local_attention_2d`, in every form and in an
ONNX file; a mask hides by False, by -inf, or by the lowest number of its dtype.

- `flex` is FlexAttention: one kernel on a GPU, in eager mode and under `torch.compile`; masks, rotary positions, groups of heads and softcap are in it.
  On a CPU in eager mode, in an export, and where memory is planned, the operator's own blocks compute the same, so that a student of this form trains, exports and runs anywhere.
- `shifts` writes a short convolution as shifted multiplies, which `torch.compile` fuses with the gates into one kernel
  (`tests/operators/test_compiled.py` counts inductor's kernels on a CPU). In eager mode a convolution is faster.
- `mamba_ssm`, `fla` and `causal_conv1d` call the kernels of these packages on a GPU, and the operator's own form elsewhere. The first two are chosen only on a
  machine that has the package and the GPU, where the kernel was run beside the operator's own form with the site's arguments, forward and backward, and
  agreed; `causal_conv1d` only where a rule says so. A rule's form whose package is not installed is an error (G821), and one that was not seen to agree a
  warning (G822). The student's `config.yaml` names the package under `needs_on_a_gpu`.

None of the forms for a GPU has run on one yet: they were tested on a CPU (FlexAttention's eager implementation and its compiled CPU kernel; the packages by
stand-ins of their published signatures), and `pytest -m gpu tests/gpu` and `benchmarks/gpu.py` are there for who has one.
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
    if spec.forms:
        where = "; ".join(f"`{f.name}`" + _where(f) for f in spec.forms)
        yield f"- Forms, the first that fits being taken: {where}."
    if spec.groups:
        yield "- Trainable groups: " + ", ".join(f"`{g}`" for g in spec.groups) + "."
    if spec.source:
        yield f"- Source: {spec.source}."
    yield ""


def _where(form: Form) -> str:
    """Where a form is taken unasked, told by asking it."""
    unasked = {"causal": True, "window": 0, "dims": 1}
    if form.wanted(unasked, CPU, None):
        return ""
    if form.wanted(unasked, CPU, 1):
        return " where there are few tokens"
    gpu = form.wanted(unasked, Machine("cuda"), None)
    package = f" by the package `{form.package[1]}`" if form.package else ""
    return package + (" for torch on a GPU" if gpu else " where a rule says so")


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
