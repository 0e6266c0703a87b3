"""A rule's clauses together: what must be there, what may be there once, what contradicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from graftc.diagnostics import Diagnostic, Note, fail
from graftc.language import syntax as s
from graftc.language.expressions import condition, folded, whole
from graftc.language.resolve_edit import Edited, edit_of
from graftc.language.resolve_guards import split_guards
from graftc.language.resolve_init import inits_of
from graftc.language.resolve_match import matches_of, report_unused
from graftc.language.resolve_repeat import check_repeated_sites, measure_of
from graftc.language.resolve_training import distill_of, drops_of, trains_inserted
from graftc.language.rules import (
    DataflowMatch,
    Distill,
    Expr,
    GroupMatch,
    Literal_,
    Match,
    Operation,
    PythonMatch,
    Remove,
    Rewrite,
    Rule,
    SequenceMatch,
    Skip,
    ValueGuard,
)
from graftc.language.scope import Scope, already

_EDITS = (s.ReplaceClause, s.RewriteClause, s.SiteClause, s.InsertClause)
Contract = Literal["exact", "approx", "learned"]
ClauseT = TypeVar("ClauseT", bound=s.Clause)


def rule_of(outer: Scope, item: s.RuleItem) -> Rule | None:
    """The rule, or None where it has mistakes; they go to the scope's log."""
    scope = outer.for_rule()
    before = len(scope.log.errors)
    clauses = item.clauses
    _repeated(scope, item)
    matches = matches_of(
        scope,
        _all(clauses, s.MatchSites) + _all(clauses, s.MatchDataflow) + _all(clauses, s.MatchPython),
    )
    if not matches.matches and len(scope.log.errors) == before:
        _missing(scope, item, "match", "match   a = self_attention in blocks all")
    read = len(scope.log.diagnostics)
    patterns = _all(clauses, s.MatchDataflow)
    unread = len(patterns) > sum(isinstance(m, DataflowMatch) for m in matches.matches)
    dataflow = any(isinstance(m, (DataflowMatch, PythonMatch)) for m in matches.matches)
    _one_pattern(scope, matches.matches, dataflow)
    guards, where = _where(scope, clauses, dataflow)
    inits = tuple(i for c in _all(clauses, s.InitClause) for i in c.items)
    edited = _edit(scope, item, inits)
    rewrites = any(isinstance(c, s.RewriteClause) for c in clauses)
    if rewrites:
        inits = ()  # they are part of the rewrite
        if not dataflow and matches.matches:
            _no_pattern(scope, item)
    if inits and edited is not None and isinstance(edited.edit, (Skip, Remove)):
        _nothing_new(scope, _all(clauses, s.InitClause)[0])
    spec = edited.spec if edited else None
    resolved_inits = inits_of(scope, inits, spec)
    distill = next((distill_of(scope, c, spec) for c in _all(clauses, s.DistillClause)), None)
    words = _all(clauses, s.WordsClause)
    drop = drops_of(scope, [w for w in words if w.keyword == "drop"])
    inserted = trains_inserted(scope, [w for w in words if w.keyword == "train"])
    contract = _contract(scope, item, distill)
    expect, expect_clause = _expect(scope, clauses)
    if (
        matches.groups is not None
        and isinstance(expect, int)
        and expect_clause
        and expect != matches.groups
    ):
        scope.log.add(_wrong_expectation(item, expect, matches.groups, expect_clause))
    if edited is not None and not any(
        d.code in ("G105", "G013") for d in scope.log.errors[before:]
    ):
        report_unused(scope)
    if unread:  # its names are not known, so that their uses are no further errors
        later = scope.log.diagnostics[read:]
        scope.log.diagnostics[read:] = [d for d in later if d.code not in ("G105", "G375")]
    measure = None
    with scope.log.attempt():
        measure = measure_of(item)
    if len(scope.log.errors) == before and edited is not None:
        with scope.log.attempt():
            _check_patterns(matches.matches, edited)
    if len(scope.log.errors) > before or edited is None:
        return None
    edit = edited.edit
    repeat = next((h for h in item.head if h.word == "repeat"), None)
    if repeat is not None and not rewrites:
        with scope.log.attempt():
            check_repeated_sites(repeat, distill, contract, edit, inserted)
        if len(scope.log.errors) > before:
            return None
    return Rule(
        name=item.name.text,
        span=item.name.span,
        matches=matches.matches,
        edit=edit,
        contract=contract,
        summary=item.summary,
        where=where,
        inits=resolved_inits,
        distill=distill,
        expect=expect,
        expect_span=expect_clause.span if expect_clause else None,
        after=tuple(n.text for h in item.head for n in h.names),
        drop=drop,
        train_inserted=inserted,
        guards=guards,
        repeat=measure,
    )


def _one_pattern(scope: Scope, matches: Sequence[Match], dataflow: bool) -> None:
    """A rule has one pattern: sites that belong together, or ops, which may name single sites."""
    if dataflow:
        wrong = next((m for m in matches if isinstance(m, (GroupMatch, SequenceMatch))), None)
        message = "a dataflow pattern names single sites"
        help = "say in ops how they follow each other: `y = b(a(x))`"
    else:
        wrong = next(iter(matches[1:]), None)
        message = "a rule matches one site, or sites that follow each other"
        help = "write `a, m = self_attention then mlp`, or a rule for each"
    if wrong is not None:
        notes = (Note("the pattern begins here", matches[0].span),)
        scope.log.add(Diagnostic("G448", message, span=wrong.span, notes=notes, help=help))


def _check_patterns(matches: Sequence[Match], edited: Edited) -> None:
    """A dataflow pattern hangs together, in every way to take its choices. Raises GraftError."""
    from graftc.rewrite.dataflow.pattern import patterns_of  # as free of torch as this package

    clauses = [m for m in matches if isinstance(m, DataflowMatch)]
    if clauses:
        statements = tuple(s for c in clauses for s in c.statements)
        rewrite = edited.edit if isinstance(edited.edit, Rewrite) else None
        patterns_of(DataflowMatch(statements, clauses[0].span), rewrite)


def _all(clauses: Sequence[s.Clause], kind: type[ClauseT]) -> tuple[ClauseT, ...]:
    return tuple(c for c in clauses if isinstance(c, kind))


def _repeated(scope: Scope, item: s.RuleItem) -> None:
    """`match`, `where`, `train` and `drop` may stand several times; the rest once, and one edit."""
    edits = [c for c in item.clauses if isinstance(c, _EDITS)]
    for second in edits[1:]:
        message = "a rule makes one edit"
        scope.log.add(
            already("G013", message, second.span, edits[0].span, "write a rule for each edit")
        )
    for keyword in ("init", "distill", "expect"):
        same = [c for c in item.clauses if c.keyword == keyword]
        for second in same[1:]:
            message = f"`{keyword}` stands twice in rule `{item.name.text}`"
            scope.log.add(already("G011", message, second.span, same[0].span, "write one clause"))
    contracts = [h for h in item.head if h.word in ("exact", "approx", "learned")]
    for words in (contracts, [h for h in item.head if h.word == "repeat"]):
        for second in words[1:]:
            message = f"`{second.word}` after `{words[0].word}`: a rule has one contract"
            scope.log.add(already("G011", message, second.span, words[0].span, "leave one out"))


def _missing(scope: Scope, item: s.RuleItem, clause: str, example: str) -> None:
    scope.log.add(
        Diagnostic(
            "G012",
            f"rule `{item.name.text}` has no `{clause}`",
            span=item.name.span,
            wanted=f"a `{clause}` clause",
            help=f"add `{example}`",
        )
    )


def _no_pattern(scope: Scope, item: s.RuleItem) -> None:
    clause = _all(item.clauses, s.RewriteClause)[0]
    scope.log.add(
        Diagnostic(
            "G375",
            "`rewrite` gives the values of a dataflow pattern new ones, and this rule has none",
            span=clause.span,
            wanted="match { y = op(…) }",
            help="to change a site, write `replace NAME with …`",
        )
    )


def _edit(scope: Scope, item: s.RuleItem, inits: Sequence[s.InitItem]) -> Edited | None:
    edits = [c for c in item.clauses if isinstance(c, _EDITS)]
    if not edits:
        scope.log.add(
            Diagnostic(
                "G012",
                f"rule `{item.name.text}` changes nothing",
                span=item.name.span,
                wanted="one of `replace`, `rewrite`, `remove`, `skip`, `insert`",
                help=f"add `replace {next(iter(scope.bindings), 'a')} with …`",
            )
        )
        return None
    with scope.log.attempt():
        return edit_of(scope, edits[0], inits)
    return None


def _where(
    scope: Scope, clauses: Sequence[s.Clause], dataflow: bool
) -> tuple[tuple[ValueGuard, ...], Expr | None]:
    """Guards on values that bind or choose, and the other guards joined."""
    found: list[Expr] = []
    guards: tuple[ValueGuard, ...] = ()
    conditions = tuple(n for c in _all(clauses, s.Where) for n in c.conditions)
    if dataflow:
        guards, conditions = split_guards(scope, conditions)
    for node in conditions:
        with scope.log.attempt():
            guard = folded(condition(scope, node))
            if isinstance(guard, Literal_):
                always = "always" if guard.value else "never"
                fail(
                    "G128",
                    f"this {always} holds",
                    span=node.span,
                    wanted="a guard that depends on the site",
                    found=node.span.text,
                    help="leave it out" if guard.value else None,
                )
            found.append(guard)
    if len(found) < 2:
        return guards, next(iter(found), None)
    return guards, Operation("and", tuple(found), found[0].span.to(found[-1].span))


def _nothing_new(scope: Scope, clause: s.InitClause) -> None:
    scope.log.add(
        Diagnostic(
            "G127", "there is nothing new to fill", span=clause.span, help="leave out `init`"
        )
    )


def _contract(scope: Scope, item: s.RuleItem, distill: Distill | None) -> Contract:
    word = next((h for h in item.head if h.word in ("exact", "approx", "learned")), None)
    if word is None:
        return "learned" if distill else "approx"
    if word.word == "learned":
        if distill is None:
            scope.log.add(
                Diagnostic(
                    "G127",
                    "a learned rule needs `distill`",
                    span=word.span,
                    help="add `distill l2`",
                )
            )
        return "learned"
    if distill is not None:
        scope.log.add(
            Diagnostic(
                "G127",
                f"a rule that is `{word.word}` is not distilled",
                span=distill.span,
                help=f"leave out `distill`, or `{word.word}`",
            )
        )
    return "exact" if word.word == "exact" else "approx"


def _expect(
    scope: Scope, clauses: Sequence[s.Clause]
) -> tuple[int | Literal["all"] | None, s.ExpectClause | None]:
    for clause in _all(clauses, s.ExpectClause):
        if clause.value is None:
            return "all", clause
        with scope.log.attempt():
            return whole(scope, clause.value, "`expect`", 1), clause
    return None, None


def _wrong_expectation(
    item: s.RuleItem, expect: int, groups: int, clause: s.ExpectClause
) -> Diagnostic:
    return Diagnostic(
        "G128",
        f"rule `{item.name.text}` can never match {expect} times",
        span=clause.span,
        wanted=f"{groups}: the block set has as many groups",
        found=str(expect),
        help=f"write `expect {groups}`",
    )
