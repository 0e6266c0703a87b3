"""One term of a dataflow pattern: ops looked up, arguments put in order, names bound or read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftc.diagnostics import fail
from graftc.language import syntax as s
from graftc.language.dataflow_ops import ALIASES, NO_OPS, OPS, SYMBOLS, OpParameter, OpWord, op_word
from graftc.language.expressions import constant
from graftc.language.rules import (
    Constant,
    EitherTerm,
    ListTerm,
    MaybeTerm,
    NotTerm,
    OpTerm,
    Ref,
    SiteTerm,
    SpreadTerm,
    Term,
)
from graftc.language.scope import Binding, Scope, listed, suggest

WORDS = frozenset(
    [
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "bool",
        "tanh",
        "floor",
        "trunc",
        "constant",
        "reflect",
        "replicate",
        "circular",
        "valid",
        "same",
    ]
)
"""Words that an op takes as they are: dtypes, forms of gelu, ways to pad and to round."""

_LITERALS = {"none": None, "true": True, "false": False}
Mode = Literal["match", "rewrite", "init"]


@dataclass(frozen=True)
class TermReader:
    """Terms of one clause. `mode`: a rewrite and an init have no choices and make no new names by reading."""

    scope: Scope
    mode: Mode

    def term(self, node: s.Expr | s.Spread) -> Term:
        match node:
            case s.Number() | s.Percent() | s.Text():
                return Constant(node.value, node.span)
            case s.Path(names=(name,)):
                return self._name(name)
            case s.Name():
                return self._name(node)
            case s.Path():
                fail(
                    "G374",
                    f"`{node.text}` is no value of the graph",
                    span=node.span,
                    wanted="a name, a number or an op",
                    help="bind the weight in the pattern: `y = linear(x, w, b)`",
                )
            case s.Spread(name=name):
                self._read(name)
                return SpreadTerm(name.text, node.span)
            case s.Unary(op="-"):
                return self._negative(node)
            case s.Unary():
                self._only_in_match(node, "`not`")
                return NotTerm(self._op_in(node.operand, "`not` takes an op"), node.span)
            case s.Maybe():
                self._only_in_match(node, "`maybe`")
                inner = self._op_in(node.value, "`maybe` takes an op")
                if not any(a is not None for a in inner.args):
                    fail("G372", "`maybe` takes an op on a value", span=node.span)
                return MaybeTerm(inner, node.span)
            case s.Alternatives():
                self._only_in_match(node, "a choice")
                return EitherTerm(tuple(self.term(c) for c in node.choices), node.span)
            case s.Binary():
                return self._binary(node)
            case s.ListOf():
                return ListTerm(tuple(self._item(i) for i in node.items), node.span)
            case s.Call():
                return self._call(node)
            case _:
                fail(
                    "G374",
                    "this is no value of the graph",
                    span=node.span,
                    wanted="a name, a number or an op",
                    found=node.span.text,
                    help="guards stand in `where`",
                )

    def _name(self, name: s.Name) -> Term:
        text = name.text
        if text in _LITERALS and text not in self.scope.bindings:
            return Constant(_LITERALS[text], name.span)
        if text not in self.scope.bindings and self.scope.setting(text) is not None:
            return Constant(constant(self.scope, name, "any"), name.span)
        binding = self._read(name)
        return SiteTerm(text, None, name.span) if binding.site else Ref(text, name.span)

    def _read(self, name: s.Name) -> Binding:
        bindings = self.scope.bindings
        if self.mode == "match":
            bindings.setdefault(name.text, Binding(name.text, name.span, None, True, False))
        found = self.scope.binding(name)
        found.used = True
        return found

    def _only_in_match(self, node: s.Expr, what: str) -> None:
        if self.mode != "match":
            fail("G374", f"{what} stands in `match` only", span=node.span, found=node.span.text)

    def _negative(self, node: s.Unary) -> Term:
        inner = self.term(node.operand)
        if isinstance(inner, Constant) and isinstance(inner.value, (int, float)):
            return Constant(-inner.value, node.span)
        return OpTerm(("neg",), (inner,), node.span, node.span)

    def _op_in(self, node: s.Expr, message: str) -> OpTerm:
        inner = self.term(node)
        if not isinstance(inner, OpTerm):
            fail("G374", message, span=node.span, wanted="op(…)", found=node.span.text)
        return inner

    def _binary(self, node: s.Binary) -> Term:
        if node.op not in SYMBOLS:
            fail(
                "G374",
                f"`{node.op}` is no op of a graph here",
                span=node.span,
                wanted="`+`, `-`, `*` or `/`",
                help="guards stand in `where`",
            )
        sides = (self.term(node.left), self.term(node.right))
        name = SYMBOLS[node.op]
        given = (*sides, *(None for _ in OPS[name].parameters[2:]))
        return OpTerm((name,), given, node.span, node.span)

    def _item(self, node: s.Expr | s.DimProduct | s.Spread) -> Term:
        if isinstance(node, s.DimProduct):
            fail(
                "G374",
                "a product of sizes stands in a guard only",
                span=node.span,
                help="write `h * d`",
            )
        return self.term(node)

    # -- calls ---------------------------------------------------------------------------------

    def _call(self, node: s.Call) -> Term:
        head = node.head
        if isinstance(head, s.Alternatives):
            self._only_in_match(node, "a choice of ops")
            names = tuple(self._op_name(c) for c in head.choices)
            return self._arguments(node, names)
        first = self.scope.bindings.get(head.names[0].text)
        if len(head.names) == 1 and first is not None and first.site:
            first.used = True
            if node.named:
                fail("G373", "a site takes its inputs in order", span=node.named[0].span)
            given = tuple(self.term(a) for a in node.arguments if not isinstance(a, s.Named))
            return SiteTerm(head.text, given, node.span)
        return self._arguments(node, (self._op_name(head),))

    def _op_name(self, node: s.Expr) -> str:
        if not isinstance(node, s.Path):
            fail("G371", "an op's name is wanted", span=node.span, found=node.span.text)
        text = node.text
        if node.names[0].text == "aten" and 2 <= len(node.names) <= 3:
            return text if len(node.names) == 3 else f"{text}.default"
        if op_word(text) is not None:
            return ALIASES.get(text, text)
        if text in NO_OPS:
            fail(
                "G378",
                f"`{text}` is never in a model: capture takes it out",
                span=node.span,
                help="leave it out",
            )
        known = (*OPS, *ALIASES)
        fail(
            "G371",
            f"unknown op `{text}`",
            span=node.span,
            wanted=listed(tuple(known)),
            found=f"`{text}`",
            help=suggest(text, known) or "name it as ATen does: `aten.NAME(…)`",
        )

    def _arguments(self, node: s.Call, ops: tuple[str, ...]) -> OpTerm:
        if any(o.startswith("aten.") for o in ops):
            positional = tuple(self.term(a) for a in node.arguments if not isinstance(a, s.Named))
            named = tuple((n.name.text, self.term(n.value)) for n in node.named)
            return OpTerm(ops, positional, node.span, node.head.span, named)
        words = [OPS[o] for o in ops]
        given = self._in_order(node, words)
        return OpTerm(ops, tuple(given), node.span, node.head.span)

    def _in_order(self, node: s.Call, words: Sequence[OpWord]) -> list[Term | None]:
        parameters = words[0].parameters
        given: list[Term | None] = [None] * len(parameters)
        rest: SpreadTerm | None = None
        at = 0
        waiting = [a for a in node.arguments if not isinstance(a, s.Named)]
        while waiting:
            argument = waiting.pop(0)
            if at < len(parameters) and parameters[at].kind == "values":
                if isinstance(argument, s.ListOf):
                    given[at] = self.term(argument)
                else:
                    items = (argument, *waiting)
                    given[at] = ListTerm(tuple(self.term(i) for i in items), node.span)
                    waiting = []
            elif isinstance(argument, s.Spread):
                rest = SpreadTerm(argument.name.text, argument.span)
                self._read(argument.name)
                if waiting:
                    fail("G372", "`…` takes all that is left: it stands last", span=argument.span)
                break
            elif at >= len(parameters):
                fail(
                    "G372",
                    f"`{words[0].name}` takes {len(parameters)} arguments",
                    span=argument.span,
                    wanted=words[0].signature,
                    found=argument.span.text,
                )
            else:
                given[at] = self._argument(argument, parameters[at])
            at += 1
        for named in node.named:
            self._named(named, words[0], given)
        for position, parameter in enumerate(parameters):
            if given[position] is not None:
                continue
            if rest is not None:
                given[position] = rest  # the matcher binds what stands from here on
                rest = SpreadTerm(rest.name, rest.span)
            elif parameter.required:
                fail(
                    "G372",
                    f"`{words[0].name}` wants `{parameter.name}`",
                    span=node.span,
                    wanted=words[0].signature,
                    found=node.span.text,
                )
        self._same_signature(node, words, given)
        return given

    def _same_signature(
        self, node: s.Call, words: Sequence[OpWord], given: list[Term | None]
    ) -> None:
        """Alternatives are called alike: what is given must be there in each, at the same place."""
        used = [p.name for p, g in zip(words[0].parameters, given, strict=True) if g is not None]
        for word in words[1:]:
            kinds = [p.kind for p in word.parameters[: len(used)]]
            if len(word.parameters) != len(words[0].parameters) or kinds != [
                p.kind for p in words[0].parameters[: len(used)]
            ]:
                fail(
                    "G372",
                    f"`{words[0].name}` and `{word.name}` do not take the same arguments",
                    span=node.head.span,
                    wanted=words[0].signature,
                    found=word.signature,
                    help="write the calls apart: `(f(x) | g(x, y))`",
                )

    def _named(self, named: s.Named, word: OpWord, given: list[Term | None]) -> None:
        names = [p.name for p in word.parameters]
        if named.name.text not in names:
            fail(
                "G373",
                f"`{word.name}` has no argument `{named.name.text}`",
                span=named.name.span,
                wanted=word.signature,
                help=suggest(named.name.text, tuple(names)),
            )
        at = names.index(named.name.text)
        if given[at] is not None:
            fail(
                "G373",
                f"`{named.name.text}` is given twice",
                span=named.span,
                wanted=word.signature,
            )
        given[at] = self._argument(named.value, word.parameters[at])

    def _argument(self, node: s.Expr, parameter: OpParameter) -> Term:
        name = node.names[0] if isinstance(node, s.Path) and len(node.names) == 1 else node
        if parameter.kind == "word" and isinstance(name, s.Name) and name.text in WORDS:
            return Constant(name.text, name.span)
        term = self.term(node)
        if isinstance(term, Constant) and isinstance(term.value, str) and parameter.kind != "word":
            fail(
                "G372",
                f"`{parameter.name}` takes no text",
                span=node.span,
                found=f'"{term.value}"',
            )
        return term


def graph_term(scope: Scope, node: s.Expr) -> Term:
    """A term of a graph that a test writes out: no choices, only names that are there. Raises GraftError."""
    return TermReader(scope, "rewrite").term(node)
