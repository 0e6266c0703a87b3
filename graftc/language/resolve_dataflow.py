"""`match { … }`, `rewrite { … }` and their `init`: the lines of a clause, and what their names become."""

from __future__ import annotations

from collections.abc import Sequence

from graftc.diagnostics import Note, fail
from graftc.language import syntax as s
from graftc.language.resolve_terms import TermReader
from graftc.language.rules import (
    Binds,
    Constant,
    DataflowMatch,
    ListTerm,
    NewParameter,
    NotTerm,
    Ref,
    Rewrite,
)
from graftc.language.scope import Binding, Scope, already, listed
from graftc.language.syntax_errors import site_needs_no_braces
from graftc.language.vocabulary import ROLES


def dataflow_match(scope: Scope, clause: s.MatchDataflow) -> DataflowMatch:
    """A pattern, its names bound in `scope`. Raises GraftError."""
    reader = TermReader(scope, "match")
    statements: list[Binds] = []
    bound: dict[str, s.Name] = {}
    for statement in clause.statements:
        if isinstance(statement, s.Returns):
            fail(
                "G120",
                "a pattern returns nothing",
                span=statement.span,
                notes=[Note("the pattern begins here", clause.span)],
                help="name the value: `o = …`",
            )
        value = reader.term(statement.value)
        for target in statement.targets:
            _bind(scope, target, bound)
        if isinstance(value, (Ref, Constant, ListTerm, NotTerm)):
            role = isinstance(value, Ref) and value.name in ROLES
            fail(
                "G374",
                "a line of a pattern is an op",
                span=statement.span,
                wanted="y = op(…)",
                found=statement.value.span.text,
                help=site_needs_no_braces(statement.span.text) if role else None,
            )
        targets = tuple(Ref(t.text, t.span) for t in statement.targets)
        statements.append(Binds(targets, value, statement.span))
    return DataflowMatch(tuple(statements), clause.span)


def _bind(scope: Scope, target: s.Name, bound: dict[str, s.Name]) -> None:
    earlier = scope.bindings.get(target.text)
    if earlier is not None:
        read = target.text not in bound and not earlier.site
        scope.log.add(
            already(
                "G113",
                f"`{target.text}` is read above the line that makes it"
                if read
                else f"`{target.text}` is bound twice",
                target.span,
                earlier.span,
                "move this line up" if read else "give it another name",
            )
        )
        return
    bound[target.text] = target
    scope.bindings[target.text] = Binding(target.text, target.span, None, True, False, True)


def dataflow_rewrite(scope: Scope, clause: s.RewriteClause, inits: Sequence[s.InitItem]) -> Rewrite:
    """What a pattern becomes. Raises GraftError."""
    new = _new_parameters(scope, inits)
    reader = TermReader(scope, "rewrite")
    statements: list[Binds] = []
    outputs: list[str] = []
    written: set[str] = set()
    for statement in clause.statements:
        if isinstance(statement, s.Returns):
            fail("G374", "a rewrite returns nothing", span=statement.span, help="write `o = …`")
        value = reader.term(statement.value)
        for target in statement.targets:
            _write(scope, target, written, outputs)
        targets = tuple(Ref(t.text, t.span) for t in statement.targets)
        statements.append(Binds(targets, value, statement.span))
    made = [b.name for b in scope.bindings.values() if b.made]
    if not outputs:
        fail(
            "G375",
            "this rewrite gives no value of the pattern a new one",
            span=clause.span,
            wanted=f"a line `{made[-1] if made else 'o'} = …`",
        )
    return Rewrite(tuple(statements), tuple(outputs), clause.span, new)


def _write(scope: Scope, target: s.Name, written: set[str], outputs: list[str]) -> None:
    found = scope.bindings.get(target.text)
    if target.text in written:
        fail(
            "G113",
            f"`{target.text}` is written twice",
            span=target.span,
            help="give it another name",
        )
    written.add(target.text)
    if found is None:
        scope.bindings[target.text] = Binding(target.text, target.span, None, False, False)
        return
    if not found.made:
        fail(
            "G375",
            f"`{target.text}` comes into the pattern from outside; a rewrite cannot change it",
            span=target.span,
            wanted=listed(tuple(b.name for b in scope.bindings.values() if b.made)),
            found=f"`{target.text}`",
            notes=[Note("it is read here", found.span)],
            help="give the new value another name",
        )
    outputs.append(target.text)


def _new_parameters(scope: Scope, inits: Sequence[s.InitItem]) -> tuple[NewParameter, ...]:
    reader = TermReader(scope, "init")
    found: list[NewParameter] = []
    for item in inits:
        if item.slot is None:
            fail(
                "G107",
                "which parameter does this fill?",
                span=item.source.span,
                wanted="NAME = …",
                help=f"write `w = {item.source.span.text}`",
            )
        value = reader.term(item.source)
        known = scope.bindings.get(item.slot.text)
        if known is not None:
            scope.log.add(
                already(
                    "G113",
                    f"`{item.slot.text}` is bound twice",
                    item.slot.span,
                    known.span,
                    "give it another name",
                )
            )
            continue
        scope.bindings[item.slot.text] = Binding(item.slot.text, item.slot.span, None, False, False)
        found.append(NewParameter(item.slot.text, value, item.span))
    return tuple(found)
