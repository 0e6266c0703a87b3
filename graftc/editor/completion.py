"""Completion: what can stand at the cursor.

Keywords come from the grammar's own tables: those that the parser would take next. Names come from
the clause and the call that the cursor stands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from graftc.diagnostics import Source
from graftc.editor.describe import argument_text, signature
from graftc.editor.keywords import DOCS
from graftc.editor.page import Page, Place
from graftc.language.load import shipped_modules
from graftc.language.parser import expected_at_end, grammar
from graftc.language.vocabulary import (
    ALL_PARTS,
    BLOCK_PARTS,
    DISTILL,
    DROPS,
    FACTS,
    FINETUNE,
    FUNCTIONS,
    LOSSES,
    PARTS,
    POLICIES,
    ROLES,
    TRAIN_WORDS,
)
from graftc.operators.spec import OperatorSpec
from graftc.operators.specs import MERGES, SPECS

ItemKind = Literal[
    "keyword", "role", "operator", "argument", "value", "name", "fact", "policy", "option", "slot",
    "module", "chain", "path", "rule", "part",
]  # fmt: skip


@dataclass(frozen=True)
class Suggestion:
    """A word that can stand at the cursor; `insert` where it is more than the label."""

    label: str
    kind: ItemKind
    detail: str = ""
    insert: str = ""


@dataclass(frozen=True)
class Known:
    """What `graftc inspect` told of a model: chain → number of blocks, and the paths of sites."""

    chains: Mapping[str, int]
    paths: tuple[str, ...] = ()


NOTHING_KNOWN = Known({})


def complete(name: str, text: str, offset: int, known: Known = NOTHING_KNOWN) -> list[Suggestion]:
    """Every word that can stand at an offset of a text, best first.

    The word that the cursor stands in is left out: an editor filters by it.

    >>> text = "rule r {\\n  match a = self_attention\\n  replace a with hy"
    >>> [s.label for s in complete("a.graft", text, len(text)) if s.label.startswith("hy")]
    ['hyena_x', 'hyena_y', 'hyena_se']
    """
    start = offset
    while start > 0 and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    page = Page.read(name, text)
    quote = _open_text(text, offset)
    if quote is not None:
        return _unique(_in_text(page.place(quote), known))
    place = page.place(start)
    if place.last == "#" or _in_comment(page, start):
        return []
    expected = expected_at_end(Source(name, text[:start]))
    names = _names(page, place, start) if "NAME" in expected else ()
    words = (
        Suggestion(w, "keyword", DOCS.get(w, ""))
        for w, terminal in grammar().terminals.keywords.items()
        if terminal in expected
    )
    return _unique((*names, *words))


def _unique(found: Iterable[Suggestion]) -> list[Suggestion]:
    return list({s.label: s for s in reversed(list(found))}.values())[::-1]


def _in_comment(page: Page, offset: int) -> bool:
    return any(t.type == "COMMENT" and t.start < offset <= t.end for t in page.tokens)


def _open_text(text: str, offset: int) -> int | None:
    """Where the string begins that the cursor stands in."""
    line = text[text.rfind("\n", 0, offset) + 1 : offset]
    if "#" in line.split('"')[0] or line.count('"') % 2 == 0:
        return None
    return text.rfind('"', 0, offset)


def _in_text(place: Place, known: Known) -> Iterator[Suggestion]:
    """Between quotes: the chains and paths of the model, where one is known."""
    if place.last == "of":
        for chain, length in known.chains.items():
            yield Suggestion(chain, "chain", f"{length} blocks, 0..{length - 1}")
    elif place.last == "module":
        for path in known.paths:
            yield Suggestion(path, "path")


def _names(page: Page, place: Place, offset: int) -> Iterator[Suggestion]:
    last = place.last
    if last == ".":
        yield from _after_dot(page, place, offset)
    elif place.item == "use":
        yield from _used(page, place)
    elif last == "by":
        measured = (f for f, word in FACTS.items() if word.measured)
        yield from (Suggestion(f, "fact", FACTS[f].doc) for f in measured)
    elif last == "blocks" or (last == "of" and place.item == "rule"):
        yield from _settings(page)
    elif not place.clause and last in ("after", "of"):
        yield from (Suggestion(r, "rule", i.summary) for r, i in page.rules.items())
    elif place.calls:
        yield from _in_call(page, place, offset)
    elif place.item == "finetune":
        yield from _options(FINETUNE)
    elif place.item == "rule":
        yield from _in_clause(page, place, offset)


def _used(page: Page, place: Place) -> Iterator[Suggestion]:
    if place.last in ("use", "from"):
        yield from (Suggestion(m, "module") for m in shipped_modules())
    if place.last in ("use", ","):
        yield from (Suggestion(r, "rule", i.summary) for r, i in page.rules.items())


def _after_dot(page: Page, place: Place, offset: int) -> Iterator[Suggestion]:
    before = place.before[-2].value if len(place.before) > 1 else ""
    if place.item == "use":
        prefix = "".join(t.value for t in place.before if t.type in ("NAME", "DOT"))
        for module in shipped_modules():
            if module.startswith(prefix):
                yield Suggestion(module[len(prefix) :], "module")
        return
    bound = page.bindings(offset).get(before)
    if bound is not None:
        role = bound.role or ""
        parts = BLOCK_PARTS if role == "block" else PARTS.get(role, ALL_PARTS)
        yield from (Suggestion(p, "part", f"of {role or before}") for p in parts)


def _in_clause(page: Page, place: Place, offset: int) -> Iterator[Suggestion]:
    clause, last = place.clause, place.last
    if clause == "match":
        if last in ("=", "in", "then"):
            yield from (Suggestion(r, "role") for r in ROLES)
    elif clause == "where":
        yield from _facts(place)
        yield from _settings(page)
    elif clause in ("replace", "insert"):
        if last in ("with", "{", ",") or (clause == "insert" and last == "insert"):
            yield from _operators(page)
        yield from _bindings(page, offset)
    elif clause in ("remove", "skip"):
        yield from _bindings(page, offset)
    elif clause == "init":
        yield from _init(page, place, offset)
    elif clause == "distill":
        if place.name == "train":
            spec = SPECS.get(page.replaced_by(offset) or "")
            yield from (Suggestion(g, "value") for g in (spec.groups if spec else ()))
        elif last in ("distill", ","):
            yield from (Suggestion(x, "value", "loss") for x in LOSSES)
            yield from _options(DISTILL)
        yield from _settings(page)
    elif clause == "drop":
        yield from (Suggestion(d, "value", doc) for d, doc in DROPS.items())
    elif clause == "train":
        yield from (Suggestion(t, "value") for t in TRAIN_WORDS)
    elif clause == "expect":
        yield from _settings(page)


def _init(page: Page, place: Place, offset: int) -> Iterator[Suggestion]:
    spec = SPECS.get(page.replaced_by(offset) or "")
    if place.name and place.last == "=":
        yield from _policies(whole=False)
        yield from _bindings(page, offset)
        return
    if spec is not None:
        for slot in spec.slots:
            yield Suggestion(slot.name, "slot", slot.doc or f"of {spec.name}", f"{slot.name} = ")
    yield from _policies(whole=True)


def _in_call(page: Page, place: Place, offset: int) -> Iterator[Suggestion]:
    call = place.calls[-1]
    spec = SPECS.get(call.head) or (MERGES.get(call.head) if place.name == "merge" else None)
    if place.last == "=":
        yield from _argument_values(page, place, spec)
    elif spec is not None:
        for arg in spec.args:
            if arg.name not in call.given:
                yield Suggestion(
                    arg.name, "argument", f"{argument_text(arg)}: {arg.doc}", f"{arg.name} = "
                )
    elif call.head == "parallel":
        yield from _bindings(page, offset)
        yield from _operators(page)
        yield from (
            Suggestion(w, "argument", d, f"{w} = ")
            for w, d in (("merge", "sum, linear or lerp"), ("norm", "first"))
            if w not in call.given
        )
    elif call.head in FACTS and call.head not in POLICIES:
        yield from _bindings(page, offset)
        yield from (
            Suggestion(o, "argument", "", f"{o} = ") for o in FACTS[call.head].options or ()
        )
    elif call.head in POLICIES:
        yield from _bindings(page, offset)
        yield from _policies(whole=False)
        yield from (
            Suggestion(o, "argument", "", f"{o} = ") for o in POLICIES[call.head].options or ()
        )
    elif call.head in FUNCTIONS:
        yield from _facts(place)
    elif call.head == "lora":
        yield from (Suggestion(w, "argument", "", f"{w} = ") for w in ("rank", "alpha"))
    else:
        yield from _bindings(page, offset)


def _argument_values(page: Page, place: Place, spec: OperatorSpec | None) -> Iterator[Suggestion]:
    call = place.calls[-1]
    arg = spec.arg(place.name) if spec else None
    if arg is not None:
        values = ("true", "false") if arg.kind == "bool" else arg.choices
        yield from (Suggestion(v, "value") for v in values)
    elif call.head == "parallel" and place.name == "merge":
        yield from (Suggestion(m, "operator", spec.summary) for m, spec in MERGES.items())
    elif call.head == "parallel" and place.name == "norm":
        yield Suggestion("first", "value", "branches read the first norm's output")
    elif call.head in POLICIES:
        option = (POLICIES[call.head].options or {}).get(place.name)
        yield from (Suggestion(c, "value") for c in (option[1] if option else ()))
    yield from _settings(page)
    if place.clause != "where":
        yield from _facts(place)


def _operators(page: Page) -> Iterator[Suggestion]:
    for name, spec in SPECS.items():
        yield Suggestion(name, "operator", f"{signature(spec)}: {spec.summary}", f"{name}(")
    for name in page.operators:
        yield Suggestion(name, "operator", "written in the language", f"{name}(")
    yield Suggestion("parallel", "operator", "branches that read one input", "parallel(")
    yield Suggestion("copy", "operator", "a copy of a block", "copy(")


def _bindings(page: Page, offset: int) -> Iterator[Suggestion]:
    for name, bound in page.bindings(offset).items():
        yield Suggestion(name, "name", bound.role or "")


def _settings(page: Page) -> Iterator[Suggestion]:
    for name, item in page.settings.items():
        yield Suggestion(name, "name", item.value.span.text)


def _facts(place: Place) -> Iterator[Suggestion]:
    for name, word in FACTS.items():
        yield Suggestion(name, "fact", word.doc, f"{name}(")
    if place.clause == "where":
        yield from (Suggestion(f, "fact", "", f"{f}(") for f in FUNCTIONS)


def _policies(*, whole: bool) -> Iterator[Suggestion]:
    for name, policy in POLICIES.items():
        if policy.whole or not whole:
            yield Suggestion(name, "policy", policy.doc)


def _options(words: Mapping[str, object]) -> Iterator[Suggestion]:
    for name, word in words.items():
        yield Suggestion(name, "option", str(getattr(word, "doc", "")), f"{name} = ")
