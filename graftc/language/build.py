"""Builds the syntax tree while the parser reduces: one method for each rule of the grammar.

The parser keeps every token, so a node's span runs from its first child to its last; a
closing NL is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, cast

from graftc.diagnostics import GraftError, Span
from graftc.language import syntax as s
from graftc.language.tokens import Token, nested_too_deep

Children = list[Any]
_DEEPEST = 100


def _span(children: Children) -> Span:
    last = children[-1]
    if isinstance(last, Token) and last.type == "NL" and len(children) > 1:
        last = children[-2]
    first_span, last_span = cast(Span, children[0].span), cast(Span, last.span)
    return Span(first_span.source, first_span.start, last_span.end)


def _nodes(children: Children, *kinds: type) -> tuple[Any, ...]:
    """The children that are nodes (of the given kinds), lines spread out."""
    found: list[Any] = []
    for child in children:
        if isinstance(child, list):
            found += _nodes(cast(Children, child), *kinds)
        elif not isinstance(child, Token) and (not kinds or isinstance(child, kinds)):
            found.append(child)
    return tuple(found)


def _at(children: Children, kind: str) -> int:
    """Where the first token of a kind stands."""
    return next(i for i, c in enumerate(children) if isinstance(c, Token) and c.type == kind)


def _name(token: Token) -> s.Name:
    return s.Name(token.value, token.span)


def _string(token: Token) -> str:
    return token.value[1:-1].replace('\\"', '"').replace("\\\\", "\\")


def _deeper(span: Span, *parts: Any) -> int:
    depth = 1 + max((cast(int, p.depth) for p in parts), default=0)
    if depth > _DEEPEST:
        raise GraftError(nested_too_deep(span))
    return depth


def number(text: str) -> int | float:
    """A number as written.

    >>> number("8k"), number("1.5"), number("0.5k"), number("1e-3"), number("2M")
    (8000, 1.5, 500, 0.001, 2000000)
    """
    factor = {"k": 1000, "M": 1_000_000}.get(text[-1], 1)
    digits = text[:-1] if factor > 1 else text
    if digits.isdigit():
        return int(digits) * factor
    value = round(float(digits) * factor, 6) if factor > 1 else float(digits)
    written_whole = factor > 1 or "e" in digits.lower()
    return int(value) if written_whole and value.is_integer() else value


class _Line(list[Any]):
    """The items of one line of a clause; `_nodes` spreads it into the clause."""

    def __init__(self, children: Children, span: Span) -> None:
        super().__init__(children)
        self.span = span


@dataclass(frozen=True)
class _Word:
    """`then ROLE`, `in ROLE`, `half`: a word that only its parent can place."""

    kind: str
    token: Token
    span: Span


@dataclass(frozen=True)
class _Names:
    names: tuple[s.Name, ...]
    span: Span


class _Place(TypedDict):
    within: tuple[s.Name, ...]
    choice: s.Choice | None


def _place(children: Children) -> _Place:
    words = (w for w in _nodes(children, _Word) if w.kind == "in")
    choice = next((x for x in children if isinstance(x, s.Choice)), None)
    return {"within": tuple(_name(w.token) for w in words), "choice": choice}


def _key(token: Token) -> s.Name:
    text = _string(token) if token.type == "STRING" else token.value
    return s.Name(text, token.span)


def _amount(child: Any) -> Any:
    return None if isinstance(child, _Word) else child


class Builder:
    """The callbacks that Lark runs. It has no state: one instance serves every parse."""

    # -- items -------------------------------------------------------------------------------

    def start(self, c: Children) -> tuple[s.Item, ...]:
        return tuple(c)

    def use_all(self, c: Children) -> s.Use:
        return s.Use(None, c[1], _span(c))

    def use_some(self, c: Children) -> s.Use:
        return s.Use(c[1].names, c[3], _span(c))

    def used_name(self, c: Children) -> s.Path:
        return c[0]

    def used_path(self, c: Children) -> s.Text:
        return s.Text(_string(c[0]), c[0].span)

    def set(self, c: Children) -> s.SetItem:
        return s.SetItem(_name(c[1]), c[3], _span(c))

    def negative(self, c: Children) -> s.Number:
        return s.Number(-number(c[1].value), _span(c))

    def rule(self, c: Children) -> s.RuleItem:
        brace = _at(c, "LBRACE")
        before = c[brace - 1]
        quoted = isinstance(before, Token) and before.type == "STRING"
        return s.RuleItem(
            _name(c[1]),
            _nodes(c[:brace], s.HeadWord),
            _string(cast(Token, before)) if quoted else "",
            _nodes(c[brace:]),
            _span(c),
        )

    def head_contract(self, c: Children) -> s.HeadWord:
        return s.HeadWord(c[0].value, c[0].span)

    def head_repeat(self, c: Children) -> s.HeadWord:
        return s.HeadWord("repeat", _span(c), measure=c[2])

    def head_after(self, c: Children) -> s.HeadWord:
        return s.HeadWord("after", _span(c), names=c[1].names)

    def finetune(self, c: Children) -> s.FinetuneItem:
        return s.FinetuneItem(_nodes(c), _span(c))

    def operator(self, c: Children) -> s.OperatorItem:
        return s.OperatorItem(
            _name(c[1]),
            _nodes(c, s.Parameter),
            _nodes(c, s.Typed),
            c[_at(c, "LBRACE") - 1],
            _nodes(c, s.Assign, s.Returns),
            _span(c),
        )

    def parameter(self, c: Children) -> s.Parameter:
        return s.Parameter(_name(c[0]), c[2] if len(c) > 1 else None, _span(c))

    def typed(self, c: Children) -> s.Typed:
        return s.Typed(_name(c[0]), c[2], _span(c))

    def type(self, c: Children) -> s.Type:
        return s.Type(_name(c[0]), c[1] if len(c) > 1 else None, _span(c))

    def result(self, c: Children) -> tuple[s.Type, ...]:
        return _nodes(c, s.Type)

    def test(self, c: Children) -> s.TestItem:
        return s.TestItem(_name(c[1]), _name(c[3]), _nodes(c), _span(c))

    def test_before(self, c: Children) -> s.TestClause:
        return s.TestClause("before", _span(c), statements=_nodes(c))

    def test_after(self, c: Children) -> s.TestClause:
        return s.TestClause("after", _span(c), statements=_nodes(c))

    def test_inputs(self, c: Children) -> s.TestClause:
        return s.TestClause("inputs", _span(c), inputs=_nodes(c))

    def test_expect(self, c: Children) -> s.TestClause:
        return s.TestClause("expect", _span(c), expect=c[1])

    def input_value(self, c: Children) -> s.Named:
        return s.Named(_name(c[0]), c[2], _span(c))

    # -- clauses -----------------------------------------------------------------------------

    def line(self, c: Children) -> _Line:
        return _Line(c, _span(c))

    def match_sites(self, c: Children) -> s.MatchSites:
        return s.MatchSites(_nodes(c), _span(c))

    def match_dataflow(self, c: Children) -> s.MatchDataflow:
        return s.MatchDataflow(_nodes(c), _span(c))

    def match_python(self, c: Children) -> s.MatchPython:
        return s.MatchPython(s.Text(_string(c[3]), c[3].span), _span(c))

    def match_site(self, c: Children) -> s.MatchItem:
        kind, what = c[2]
        span = _span([*c[:2], what, *c[3:]])
        return s.MatchItem(kind, c[0].names, span, what=what, **_place(c))

    def match_pair(self, c: Children) -> s.MatchItem:
        return s.MatchItem("pair", c[0].names, _span(c), choice=c[-1])

    def match_run(self, c: Children) -> s.MatchItem:
        return s.MatchItem("run", c[0].names, _span(c), length=c[5], choice=c[-1])

    def match_then(self, c: Children) -> s.MatchItem:
        later = tuple(_name(x.token) for x in _nodes(c, _Word) if x.kind == "then")
        return s.MatchItem("then", c[0].names, _span(c), roles=(_name(c[2]), *later), **_place(c))

    def site_role(self, c: Children) -> tuple[str, s.Name]:
        return "role", _name(c[0])

    def site_path(self, c: Children) -> tuple[str, s.Text]:
        return "path", s.Text(_string(c[1]), _span(c))

    def site_class(self, c: Children) -> tuple[str, s.Text]:
        return "class", s.Text(_string(c[1]), _span(c))

    def then(self, c: Children) -> _Word:
        return _Word("then", c[1], _span(c))

    def within(self, c: Children) -> _Word:
        return _Word("in", c[1], _span(c))

    def in_blocks(self, c: Children) -> s.Choice:
        choice: s.Choice = c[2]
        return s.Choice(choice.chain, choice.blocks, _span(c))

    def where(self, c: Children) -> s.Where:
        return s.Where(_nodes(c), _span(c))

    def replace_sites(self, c: Children) -> s.ReplaceClause:
        return s.ReplaceClause(c[1].names, c[3], False, _span(c))

    def replace_one_of(self, c: Children) -> s.ReplaceClause:
        return s.ReplaceClause(c[1].names, c[5], True, _span(c))

    def replace_group(self, c: Children) -> s.ReplaceClause:
        return s.ReplaceClause((), c[2], False, _span(c))

    def rewrite(self, c: Children) -> s.RewriteClause:
        return s.RewriteClause(_nodes(c), _span(c))

    def remove(self, c: Children) -> s.SiteClause:
        return s.SiteClause("remove", _name(c[1]), _span(c))

    def skip(self, c: Children) -> s.SiteClause:
        return s.SiteClause("skip", _name(c[1]), _span(c))

    def insert(self, c: Children) -> s.InsertClause:
        return s.InsertClause(c[1], _name(c[3]), _span(c))

    def init(self, c: Children) -> s.InitClause:
        return s.InitClause(_nodes(c), _span(c))

    def init_slot(self, c: Children) -> s.InitItem:
        return s.InitItem(_key(c[0]), c[2], _span(c))

    def init_whole(self, c: Children) -> s.InitItem:
        return s.InitItem(None, c[0], _span(c))

    def distill(self, c: Children) -> s.DistillClause:
        return s.DistillClause(_nodes(c), _span(c))

    def option_word(self, c: Children) -> s.Option:
        return s.Option(_name(c[0]), None, _span(c))

    def option_set(self, c: Children) -> s.Option:
        return s.Option(_key(c[0]), c[2], _span(c))

    def expect(self, c: Children) -> s.ExpectClause:
        return s.ExpectClause(None if isinstance(c[1], Token) else c[1], _span(c))

    def train(self, c: Children) -> s.WordsClause:
        return s.WordsClause("train", c[1].names, _span(c))

    def drop(self, c: Children) -> s.WordsClause:
        return s.WordsClause("drop", c[1].names, _span(c))

    # -- which blocks ------------------------------------------------------------------------

    def choice(self, c: Children) -> s.Choice:
        chain = s.Text(_string(c[1]), c[1].span) if len(c) > 1 else None
        return s.Choice(chain, c[-1], _span(c))

    def block_word(self, c: Children) -> s.BlockWord:
        return s.BlockWord(c[0].value, c[0].span)

    def block_end(self, c: Children) -> s.BlockEnd:
        return s.BlockEnd(c[0].value == "first", _amount(c[1]), _span(c))

    def range(self, c: Children) -> s.BlockRange:
        return s.BlockRange(c[0], c[2] if len(c) > 1 else None, None, _span(c))

    def block_step(self, c: Children) -> s.BlockRange:
        return s.BlockRange(c[0].first, c[0].last, c[2], _span(c))

    def block_every(self, c: Children) -> s.BlockEvery:
        return s.BlockEvery(c[0], c[3], c[5] if len(c) > 4 else None, _span(c))

    def block_measured(self, c: Children) -> s.BlockMeasured:
        return s.BlockMeasured(c[0].value == "top", _amount(c[1]), c[3], _span(c))

    def block_except(self, c: Children) -> s.BlockExcept:
        return s.BlockExcept(c[0], c[2], _span(c))

    def half(self, c: Children) -> _Word:
        return _Word("half", c[0], c[0].span)

    def name(self, c: Children) -> s.Name:
        return _name(c[0])

    # -- expressions -------------------------------------------------------------------------

    def number(self, c: Children) -> s.Number:
        return s.Number(number(c[0].value), c[0].span)

    def percent(self, c: Children) -> s.Percent:
        return s.Percent(float(c[0].value[:-1]) / 100, c[0].span)

    def text(self, c: Children) -> s.Text:
        return s.Text(_string(c[0]), c[0].span)

    def path(self, c: Children) -> s.Path:
        return s.Path(tuple(_name(t) for t in c[::2]), _span(c))

    def names(self, c: Children) -> _Names:
        return _Names(tuple(_name(t) for t in c[::2]), _span(c))

    def binary(self, c: Children) -> s.Binary:
        span = _span(c)
        return s.Binary(c[1].value, c[0], c[2], span, _deeper(c[1].span, c[0], c[2]))

    def unary(self, c: Children) -> s.Unary:
        return s.Unary(c[0].value, c[1], _span(c), _deeper(c[0].span, c[1]))

    def is_kind(self, c: Children) -> s.IsKind:
        return s.IsKind(c[0], _name(c[2]), _span(c), _deeper(c[1].span, c[0]))

    def has_shape(self, c: Children) -> s.HasShape:
        return s.HasShape(c[0], c[2], _span(c), _deeper(c[1].span, c[0], c[2]))

    def maybe(self, c: Children) -> s.Maybe:
        return s.Maybe(c[1], _span(c), _deeper(c[0].span, c[1]))

    def paren(self, c: Children) -> s.Expr:
        return c[1]

    def call(self, c: Children) -> s.Call:
        arguments = _nodes(c[1:])
        return s.Call(c[0], arguments, _span(c), _deeper(c[1].span, c[0], *arguments))

    def positional(self, c: Children) -> s.Expr:
        return c[0]

    def named(self, c: Children) -> s.Named:
        return s.Named(_name(c[0]), c[2], _span(c))

    def spread(self, c: Children) -> s.Spread:
        return s.Spread(_name(c[0]), _span(c))

    def alternatives(self, c: Children) -> s.Alternatives:
        choices = _nodes(c)
        return s.Alternatives(choices, _span(c), _deeper(c[0].span, *choices))

    def braces(self, c: Children) -> s.Braces:
        items = _nodes(c)
        return s.Braces(items, _span(c), _deeper(c[0].span, *items))

    def item_value(self, c: Children) -> s.Expr:
        return c[0]

    def item_range(self, c: Children) -> s.RangeItem:
        step = c[4] if len(c) > 3 else None
        return s.RangeItem(c[0], c[2], step, _span(c), _deeper(c[1].span, c[0], c[2]))

    def item_pair(self, c: Children) -> s.Pair:
        return s.Pair(_name(c[0]), c[2], _span(c), _deeper(c[1].span, c[2]))

    def list(self, c: Children) -> s.ListOf:
        items = _nodes(c)
        return s.ListOf(items, _span(c), _deeper(c[0].span, *items))

    def dim_product(self, c: Children) -> s.DimProduct:
        return s.DimProduct(tuple(_name(t) for t in c[1:-1]), _span(c))

    def assign(self, c: Children) -> s.Assign:
        return s.Assign(c[0].names, c[2], _span(c))

    def returns(self, c: Children) -> s.Returns:
        return s.Returns(_nodes(c), _span(c))
