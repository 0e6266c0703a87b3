"""Builds the syntax tree while the parser reduces: one method for each rule of the grammar.

Items and clauses are here, what stands inside them in build_values.py.
"""

from __future__ import annotations

from typing import TypedDict, cast

from graftc.language import syntax as s
from graftc.language.build_values import (
    Children,
    Line,
    ValueBuilder,
    Word,
    index_of,
    name_of,
    nodes,
    number,
    span_of,
    string,
)
from graftc.language.tokens import Token


class Place(TypedDict):
    within: tuple[s.Name, ...]
    choice: s.Choice | None


def place(children: Children) -> Place:
    words = (w for w in nodes(children, Word) if w.kind == "in")
    choice = next((x for x in children if isinstance(x, s.Choice)), None)
    return {"within": tuple(name_of(w.token) for w in words), "choice": choice}


def key_of(token: Token) -> s.Name:
    text = string(token) if token.type == "STRING" else token.value
    return s.Name(text, token.span)


class Builder(ValueBuilder):
    """The callbacks that Lark runs. It has no state: one instance serves every parse."""

    # -- items -------------------------------------------------------------------------------

    def start(self, c: Children) -> tuple[s.Item, ...]:
        return tuple(c)

    def use_all(self, c: Children) -> s.Use:
        return s.Use(None, c[1], span_of(c))

    def use_some(self, c: Children) -> s.Use:
        return s.Use(c[1].names, c[3], span_of(c))

    def used_name(self, c: Children) -> s.Path:
        return c[0]

    def used_path(self, c: Children) -> s.Text:
        return s.Text(string(c[0]), c[0].span)

    def set(self, c: Children) -> s.SetItem:
        return s.SetItem(name_of(c[1]), c[3], span_of(c))

    def negative(self, c: Children) -> s.Number:
        return s.Number(-number(c[1].value), span_of(c))

    def rule(self, c: Children) -> s.RuleItem:
        brace = index_of(c, "LBRACE")
        before = c[brace - 1]
        quoted = isinstance(before, Token) and before.type == "STRING"
        return s.RuleItem(
            name_of(c[1]),
            nodes(c[:brace], s.HeadWord),
            string(cast(Token, before)) if quoted else "",
            nodes(c[brace:]),
            span_of(c),
        )

    def head_contract(self, c: Children) -> s.HeadWord:
        return s.HeadWord(c[0].value, c[0].span)

    def head_repeat(self, c: Children) -> s.HeadWord:
        return s.HeadWord("repeat", span_of(c), measure=c[2])

    def head_after(self, c: Children) -> s.HeadWord:
        return s.HeadWord("after", span_of(c), names=c[1].names)

    def finetune(self, c: Children) -> s.FinetuneItem:
        return s.FinetuneItem(nodes(c), span_of(c))

    def operator(self, c: Children) -> s.OperatorItem:
        return s.OperatorItem(
            name_of(c[1]),
            nodes(c, s.Parameter),
            nodes(c, s.Typed),
            c[index_of(c, "LBRACE") - 1],
            nodes(c, s.Assign, s.Returns),
            span_of(c),
        )

    def parameter(self, c: Children) -> s.Parameter:
        return s.Parameter(name_of(c[0]), c[2] if len(c) > 1 else None, span_of(c))

    def typed(self, c: Children) -> s.Typed:
        return s.Typed(name_of(c[0]), c[2], span_of(c))

    def type(self, c: Children) -> s.Type:
        return s.Type(name_of(c[0]), c[1] if len(c) > 1 else None, span_of(c))

    def result(self, c: Children) -> tuple[s.Type, ...]:
        return nodes(c, s.Type)

    def test(self, c: Children) -> s.TestItem:
        return s.TestItem(name_of(c[1]), name_of(c[3]), nodes(c), span_of(c))

    def test_before(self, c: Children) -> s.TestClause:
        return s.TestClause("before", span_of(c), statements=nodes(c))

    def test_after(self, c: Children) -> s.TestClause:
        return s.TestClause("after", span_of(c), statements=nodes(c))

    def test_inputs(self, c: Children) -> s.TestClause:
        return s.TestClause("inputs", span_of(c), inputs=nodes(c))

    def test_expect(self, c: Children) -> s.TestClause:
        return s.TestClause("expect", span_of(c), expect=c[1])

    def input_value(self, c: Children) -> s.Named:
        return s.Named(name_of(c[0]), c[2], span_of(c))

    # -- clauses -----------------------------------------------------------------------------

    def line(self, c: Children) -> Line:
        return Line(c, span_of(c))

    def match_sites(self, c: Children) -> s.MatchSites:
        return s.MatchSites(nodes(c), span_of(c))

    def match_dataflow(self, c: Children) -> s.MatchDataflow:
        return s.MatchDataflow(nodes(c), span_of(c))

    def match_python(self, c: Children) -> s.MatchPython:
        return s.MatchPython(s.Text(string(c[3]), c[3].span), span_of(c))

    def match_site(self, c: Children) -> s.MatchItem:
        kind, what = c[2]
        span = span_of([*c[:2], what, *c[3:]])
        return s.MatchItem(kind, c[0].names, span, what=what, **place(c))

    def match_pair(self, c: Children) -> s.MatchItem:
        return s.MatchItem("pair", c[0].names, span_of(c), choice=c[-1])

    def match_run(self, c: Children) -> s.MatchItem:
        return s.MatchItem("run", c[0].names, span_of(c), length=c[5], choice=c[-1])

    def match_then(self, c: Children) -> s.MatchItem:
        later = tuple(name_of(x.token) for x in nodes(c, Word) if x.kind == "then")
        return s.MatchItem(
            "then", c[0].names, span_of(c), roles=(name_of(c[2]), *later), **place(c)
        )

    def site_role(self, c: Children) -> tuple[str, s.Name]:
        return "role", name_of(c[0])

    def site_path(self, c: Children) -> tuple[str, s.Text]:
        return "path", s.Text(string(c[1]), span_of(c))

    def site_class(self, c: Children) -> tuple[str, s.Text]:
        return "class", s.Text(string(c[1]), span_of(c))

    def then(self, c: Children) -> Word:
        return Word("then", c[1], span_of(c))

    def within(self, c: Children) -> Word:
        return Word("in", c[1], span_of(c))

    def in_blocks(self, c: Children) -> s.Choice:
        choice: s.Choice = c[2]
        return s.Choice(choice.chain, choice.blocks, span_of(c))

    def where(self, c: Children) -> s.Where:
        return s.Where(nodes(c), span_of(c))

    def replace_sites(self, c: Children) -> s.ReplaceClause:
        return s.ReplaceClause(c[1].names, c[3], False, span_of(c))

    def replace_one_of(self, c: Children) -> s.ReplaceClause:
        return s.ReplaceClause(c[1].names, c[5], True, span_of(c))

    def replace_group(self, c: Children) -> s.ReplaceClause:
        return s.ReplaceClause((), c[2], False, span_of(c))

    def rewrite(self, c: Children) -> s.RewriteClause:
        return s.RewriteClause(nodes(c), span_of(c))

    def remove(self, c: Children) -> s.SiteClause:
        return s.SiteClause("remove", name_of(c[1]), span_of(c))

    def skip(self, c: Children) -> s.SiteClause:
        return s.SiteClause("skip", name_of(c[1]), span_of(c))

    def insert(self, c: Children) -> s.InsertClause:
        return s.InsertClause(c[1], name_of(c[3]), span_of(c))

    def init(self, c: Children) -> s.InitClause:
        return s.InitClause(nodes(c), span_of(c))

    def init_slot(self, c: Children) -> s.InitItem:
        return s.InitItem(key_of(c[0]), c[2], span_of(c))

    def init_whole(self, c: Children) -> s.InitItem:
        return s.InitItem(None, c[0], span_of(c))

    def distill(self, c: Children) -> s.DistillClause:
        return s.DistillClause(nodes(c), span_of(c))

    def option_word(self, c: Children) -> s.Option:
        return s.Option(name_of(c[0]), None, span_of(c))

    def option_set(self, c: Children) -> s.Option:
        return s.Option(key_of(c[0]), c[2], span_of(c))

    def expect(self, c: Children) -> s.ExpectClause:
        return s.ExpectClause(None if isinstance(c[1], Token) else c[1], span_of(c))

    def train(self, c: Children) -> s.WordsClause:
        return s.WordsClause("train", c[1].names, span_of(c))

    def drop(self, c: Children) -> s.WordsClause:
        return s.WordsClause("drop", c[1].names, span_of(c))
