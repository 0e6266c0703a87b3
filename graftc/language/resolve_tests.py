"""`test NAME of RULE { … }`: its graphs as terms, its inputs with their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from graftc.diagnostics import Diagnostic, GraftError, Note, Span, fail
from graftc.language import syntax as s
from graftc.language.resolve_terms import graph_term
from graftc.language.rules import (
    Binds,
    Constant,
    DataflowMatch,
    GraphInput,
    GraphTest,
    PythonMatch,
    Ref,
    Rewrite,
    Rule,
    Term,
)
from graftc.language.scope import Binding, Log, Scope, already, listed, suggest

_KINDS: dict[str, Literal["tensor", "weight"]] = {
    "tensor": "tensor",
    "tokens": "tensor",
    "weight": "weight",
}
MOST_NUMBERS = 10_000_000


def check_test_names(items: Sequence[s.TestItem], log: Log) -> None:
    """No two tests have one name."""
    seen: dict[str, s.TestItem] = {}
    for item in items:
        name = item.name
        if name.text in seen:
            message, first = f"two tests are called `{name.text}`", seen[name.text].name.span
            log.add(already("G115", message, name.span, first, "give one another name"))
        seen.setdefault(name.text, item)


def test_of(outer: Scope, item: s.TestItem, rule: Rule) -> GraphTest:
    """A test of a rule on ops. Raises GraftError."""
    if not isinstance(rule.edit, Rewrite) or not all(
        isinstance(m, (DataflowMatch, PythonMatch)) for m in rule.matches
    ):
        fail(
            "G470",
            f"rule `{rule.name}` is on sites of a model; `test` takes rules on ops",
            span=item.rule.span,
            wanted="a rule of `match { … }` and `rewrite { … }`, without sites",
            notes=[Note("the rule is here", rule.span)],
            help="try a rule on sites with `graftc plan FILE -m MODEL`",
        )
    clauses = {c.word: c for c in item.clauses}
    reader = _TestReader(outer.for_rule())
    if "inputs" in clauses:
        for entry in clauses["inputs"].inputs:
            reader.input(entry)
    given = dict(reader.scope.bindings)
    before = clauses["before"]
    statements, outputs = reader.graph(before)
    after: tuple[Binds, ...] | None = None
    if "after" in clauses:
        second = _TestReader(replace(reader.scope, bindings=dict(given)))
        for new in rule.edit.new:
            second.scope.bindings.setdefault(
                new.name, Binding(new.name, new.span, None, True, False)
            )
        after = second.after(clauses["after"], outputs, before.span)
    _all_used(given)
    count = clauses.get("expect")
    return GraphTest(
        item.name.text,
        rule,
        tuple(reader.inputs),
        reader.numbers,
        statements,
        outputs,
        item.name.span,
        after,
        clauses["after"].span if "after" in clauses else None,
        _whole(count) if count is not None else None,
        count.span if count is not None else None,
    )


def _whole(clause: s.TestClause) -> int:
    count = cast(s.Expr, clause.expect)
    if isinstance(count, s.Number) and isinstance(count.value, int):
        return count.value
    fail("G120", "`expect` takes a whole number here", span=clause.span, wanted="expect 1")


def _all_used(given: dict[str, Binding]) -> None:
    for binding in given.values():
        if not binding.used:
            fail(
                "G114",
                f"input `{binding.name}` is never used",
                span=binding.span,
                help="leave it out",
            )


@dataclass
class _TestReader:
    """Reads the clauses of one test; the scope's bindings are the inputs and the values made so far."""

    scope: Scope
    inputs: list[GraphInput] = field(default_factory=list[GraphInput])
    numbers: dict[str, int | float] = field(default_factory=dict[str, "int | float"])

    def input(self, entry: s.Typed | s.Named) -> None:
        """`x: tensor[2, n, 8]`, or `n = 5`."""
        self._new(entry.name)
        if isinstance(entry, s.Named):
            term = graph_term(self.scope, entry.value)
            value = term.value if isinstance(term, Constant) else None
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                fail(
                    "G471",
                    f"input `{entry.name.text}` is no number",
                    span=entry.value.span,
                    wanted="a number, or `x: tensor[…]`",
                    found=entry.value.span.text,
                )
            self.numbers[entry.name.text] = value
        else:
            self.inputs.append(self._tensor(entry))
        self._bind(entry.name, made=False)

    def _tensor(self, entry: s.Typed) -> GraphInput:
        kind = entry.type.name
        if kind.text not in _KINDS:
            fail(
                "G121",
                f"unknown type `{kind.text}`",
                span=kind.span,
                wanted=listed(tuple(_KINDS)),
                help=suggest(kind.text, tuple(_KINDS)),
            )
        if entry.type.shape is None:
            fail(
                "G471",
                f"input `{entry.name.text}` has no shape",
                span=entry.type.span,
                wanted=f"{kind.text}[2, 8]",
            )
        shape = tuple(self._size(d) for d in entry.type.shape.items)
        count = 1
        for size in shape:
            count *= size
        if count > MOST_NUMBERS:
            fail(
                "G122",
                f"input `{entry.name.text}` is too large for a test",
                span=entry.type.span,
                wanted=f"at most {MOST_NUMBERS:,} numbers",
                found=f"{count:,}",
            )
        return GraphInput(entry.name.text, _KINDS[kind.text], shape, entry.span)

    def _size(self, node: s.Expr | s.DimProduct | s.Spread) -> int:
        value: object = None
        if isinstance(node, s.Number):
            value = node.value
        elif isinstance(node, s.Path) and node.text in self.numbers:
            self.scope.bindings[node.text].used = True
            value = self.numbers[node.text]
        if not isinstance(value, int) or value < 1:
            fail(
                "G471",
                "a test's graph is made of known sizes",
                span=node.span,
                wanted="a whole number of at least 1, or the name of one given before",
                found=node.span.text,
                help=f"write `inputs {node.text} = 8, …`"
                if isinstance(node, s.Path) and len(node.names) == 1
                else None,
            )
        return value

    def graph(self, clause: s.TestClause) -> tuple[tuple[Binds, ...], tuple[str, ...]]:
        """The lines of a graph, and what it returns: where no line says so, the values that none reads."""
        made: dict[str, s.Name] = {}
        lines: list[Binds] = []
        returned: tuple[str, ...] | None = None
        for statement in clause.statements:
            if returned is not None:
                fail("G472", "nothing follows `return`", span=statement.span)
            if isinstance(statement, s.Returns):
                returned = tuple(self._returned(v, made) for v in statement.values)
                continue
            value = self._term(statement.value)
            for target in statement.targets:
                self._new(target)
                self._bind(target, made=True)
                made[target.text] = target
            targets = tuple(Ref(t.text, t.span) for t in statement.targets)
            lines.append(Binds(targets, value, statement.span))
        last = tuple(n for n in made if not self.scope.bindings[n].used)
        outputs = last if returned is None else returned
        if not outputs:
            fail(
                "G472",
                f"`{clause.word}` computes nothing",
                span=clause.span,
                wanted="a line `y = op(…)`",
            )
        for name in last:
            if name not in outputs:
                fail("G114", f"`{name}` is never used", span=made[name].span, help="leave it out")
        return tuple(lines), outputs

    def after(
        self, clause: s.TestClause, outputs: tuple[str, ...], before: Span
    ) -> tuple[Binds, ...]:
        """The lines of `after`, which gives the values of `before` again."""
        lines, _ = self.graph(clause)
        made = {t.name for line in lines for t in line.targets}
        for name in outputs:
            if name not in made:
                fail(
                    "G472",
                    f"`after` does not give `{name}`",
                    span=clause.span,
                    wanted=f"a line `{name} = …`",
                    notes=[Note("the graph before returns it", before)],
                )
        for line in lines:
            for target in line.targets:
                if not self.scope.bindings[target.name].used and target.name not in outputs:
                    fail(
                        "G114",
                        f"`{target.name}` is never used, and `before` does not return it",
                        span=target.span,
                        help="leave it out",
                    )
        return lines

    def _returned(self, node: s.Expr, made: dict[str, s.Name]) -> str:
        if isinstance(node, s.Path) and node.text in made:
            return node.text
        fail("G472", "`return` takes names of values that the graph makes", span=node.span,
             wanted=listed(tuple(made)) or "a line `y = op(…)` above")  # fmt: skip

    def _term(self, node: s.Expr) -> Term:
        try:
            return graph_term(self.scope, node)
        except GraftError as error:
            raise GraftError(*(self._of_test(d) for d in error.diagnostics)) from None

    def _of_test(self, diagnostic: Diagnostic) -> Diagnostic:
        """What is not bound here is no input of the test: `match` binds nothing in it."""
        if diagnostic.code != "G105":
            return diagnostic
        wanted = "an input of the test or a value computed above"
        names = listed(tuple(self.scope.bindings))
        help_ = diagnostic.help if self.scope.bindings else "add `inputs x: tensor[2, 8]`"
        return replace(diagnostic, wanted=f"{wanted}: {names}" if names else wanted, help=help_)

    def _new(self, name: s.Name) -> None:
        earlier = self.scope.bindings.get(name.text)
        if earlier is not None:
            raise GraftError(
                already("G113", f"`{name.text}` is bound twice", name.span, earlier.span,
                        "give it another name")
            )  # fmt: skip

    def _bind(self, name: s.Name, *, made: bool) -> None:
        self.scope.bindings[name.text] = Binding(name.text, name.span, None, False, False, made)
