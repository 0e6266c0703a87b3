"""Go to definition: where a word of a `.graft` file comes from."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import graftc
from graftc.diagnostics import Span
from graftc.editor.meaning import Meaning
from graftc.editor.page import Page
from graftc.language import syntax as s
from graftc.operators.specs import MERGES, SPECS


@dataclass(frozen=True)
class Location:
    """A place in a file: 0-based lines and columns, in characters, end excluded."""

    path: Path
    start: tuple[int, int]
    end: tuple[int, int]


def definition(page: Page, meaning: Meaning) -> Location | None:
    """Where the word is defined, or None where it is the language's own.

    A `set` parameter, a binding, a rule, an operator of a file, a used file; of an operator that ships
    with graftc, its class.
    """
    name = meaning.name
    if meaning.kind == "binding":
        return _of_span(page.bindings(meaning.token.start)[name].token.span)
    if meaning.kind == "setting" and name in page.settings:
        return _of_span(page.settings[name].name.span)
    if meaning.kind in ("rule", "used") and name in page.rules:
        return _of_span(page.rules[name].name.span)
    if meaning.kind in ("written", "used") and name in page.operators:
        return _of_span(page.operators[name].name.span)
    if meaning.kind == "file":
        return _used_file(page, meaning)
    if meaning.kind in ("operator", "merge"):
        spec = SPECS.get(name) if meaning.kind == "operator" else MERGES.get(name)
        return _class(spec.module) if spec else None
    return None


def _of_span(span: Span) -> Location:
    (line, column), (last, end) = (span.source.position(x) for x in (span.start, span.end))
    return Location(Path(span.source.name).absolute(), (line - 1, column - 1), (last - 1, end - 1))


def _used_file(page: Page, meaning: Meaning) -> Location | None:
    at = meaning.token.start
    uses = (i for i in page.document.items if isinstance(i, s.Use))
    use = next((u for u in uses if u.span.start <= at < u.span.end), None)
    document = page.used_file(use) if use else None
    if document is None:
        return None
    if use is not None and isinstance(use.module, s.Path) and use.names is None:
        last = use.module.names[-1]
        named = next(
            (r for r in document.items if isinstance(r, s.RuleItem) and r.name.text == last.text),
            None,
        )
        if named is not None and last.span.start == at:  # `use std.mixers.hyena`: the rule itself
            return _of_span(named.name.span)
    return Location(Path(document.source.name).absolute(), (0, 0), (0, 0))


def _class(module: str) -> Location | None:
    """The class of `graftc.operators.hyena:HyenaX`, found in its text: importing it would bring torch."""
    package, _, name = module.partition(":")
    path = Path(graftc.__file__).parent.joinpath(*package.split(".")[1:]).with_suffix(".py")
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Location(path, (node.lineno - 1, 6), (node.lineno - 1, 6 + len(name)))
    return Location(path, (0, 0), (0, 0))
