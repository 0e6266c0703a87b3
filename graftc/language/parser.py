"""Text → Document: Lark's LALR tables, driven token by token.

The driver chooses between the two readings of a word (see tokens.py) by what the grammar
allows at that point, and after a syntax error goes on at the next item, so that a file's
independent mistakes are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from lark import Lark
from lark.lexer import Lexer, PatternStr
from lark.parsers.lalr_analysis import Shift

from graftc.diagnostics import Diagnostic, GraftError, Source
from graftc.language import syntax
from graftc.language.build import Builder
from graftc.language.resources import grammar_text
from graftc.language.syntax_errors import ITEM_WORDS, no_value, unexpected
from graftc.language.tokens import Terminals, Token, lay_out, nested_too_deep, scan

_MOST_ERRORS = 20
_DEEPEST_STACK = 1000


class _NoLexer(Lexer):
    """Lark wants a lexer; the tokens come from tokens.py instead."""

    def __init__(self, lexer_conf: Any) -> None:
        pass

    def lex(self, lexer_state: Any, parser_state: Any) -> Iterator[Any]:
        return iter(())


@dataclass(frozen=True)
class Grammar:
    """The parser's tables and the terminals, built once a process."""

    lark: Lark
    terminals: Terminals


@lru_cache(maxsize=1)
def grammar() -> Grammar:
    """grammar/graft.lark, read. About 0.1 s, so nothing is cached on disk."""
    lark = Lark(
        grammar_text(),
        parser="lalr",
        lexer=_NoLexer,
        start=["start", "set_value"],
        transformer=cast(Any, Builder()),
        keep_all_tokens=True,
        maybe_placeholders=False,
    )
    words: dict[str, str] = {}
    signs: dict[str, str] = {}
    shapes: dict[str, str] = {}
    for terminal in lark.terminals:
        text = str(terminal.pattern.value)
        if not isinstance(terminal.pattern, PatternStr):
            shapes[terminal.name] = text
        elif text.isalpha():
            words[terminal.name] = text
        else:
            signs[terminal.name] = text
    return Grammar(lark, Terminals.build(words, signs, shapes))


@dataclass(frozen=True)
class _Stop(Exception):
    """The parser cannot go on at token `at`."""

    at: int
    diagnostic: Diagnostic


_Reduction = tuple[int, Any, str]
"""How many values a rule takes off the stack, what makes one of them, and the symbol that it is then."""


@dataclass(frozen=True)
class _Tables:
    """Lark's tables for a start symbol, as plain dicts of plain strings.

    `steps`: state → terminal → the state to shift to, or a reduction. `gotos`: state → symbol → state.
    """

    steps: Mapping[int, Mapping[str, int | _Reduction]]
    gotos: Mapping[int, Mapping[str, int]]
    start: int
    end: int


@lru_cache(maxsize=2)
def _tables(start: str) -> _Tables:
    lark = cast(Any, grammar().lark)  # Lark's types leave the parser's state open
    conf = lark.parse_interactive(start=start).parser_state.parse_conf
    reductions: dict[int, _Reduction] = {}
    steps: dict[int, dict[str, int | _Reduction]] = {}
    gotos: dict[int, dict[str, int]] = {}
    for state, row in conf.states.items():
        mine: dict[str, int | _Reduction] = {}
        further: dict[str, int] = {}
        for symbol, (action, target) in row.items():
            if action is not Shift:
                known = reductions.get(id(target))
                if known is None:
                    size, name = len(target.expansion), str(target.origin.name)
                    known = reductions[id(target)] = (size, conf.callbacks[target], name)
                mine[str(symbol)] = known
            elif symbol.isupper() or symbol == "$END":
                mine[str(symbol)] = target
            else:
                further[str(symbol)] = target
        steps[state], gotos[state] = mine, further
    return _Tables(steps, gotos, conf.start_state, conf.end_state)


def _drive(tokens: Sequence[Token], start: str) -> Any:
    """The result of the start symbol. Raises `_Stop`."""
    tables = _tables(start)
    steps, gotos, end_state = tables.steps, tables.gotos, tables.end
    state = tables.start
    stack: list[int] = [state]
    values: list[Any] = []
    at = 0
    try:
        for at, token in enumerate((*tokens, _end(tokens))):
            if len(stack) > _DEEPEST_STACK:
                raise _Stop(at, nested_too_deep(token.span))
            row = steps[state]
            kind = token.type
            if token.keyword is not None:
                kind = token.type = token.keyword if token.keyword in row else "NAME"
            while state != end_state:
                step = row.get(kind)
                if step is None:
                    raise _Stop(at, _unexpected(tables, tokens, at, start))
                if isinstance(step, int):
                    state = step
                    stack.append(state)
                    values.append(token)
                    break
                size, make, symbol = step
                if size:
                    children = values[-size:]
                    del stack[-size:], values[-size:]
                else:
                    children = []
                values.append(make(children))
                state = gotos[stack[-1]][symbol]
                stack.append(state)
                row = steps.get(state, row)
        return values[-1]
    except GraftError as error:  # the builder found it nested too deep
        raise _Stop(at, error.diagnostics[0]) from None


def _unexpected(tables: _Tables, tokens: Sequence[Token], at: int, start: str) -> Diagnostic:
    """The diagnostic for a token that cannot stand here; what could is found by reading the text again."""
    before: list[int] = []
    stack = [tables.start]
    for token in tokens[:at]:
        before = stack
        stack = _after(tables, stack.copy(), token.type) or stack
    return unexpected(tokens, at, _accepted(tables, stack), _accepted(tables, before), start)


def _after(tables: _Tables, stack: list[int], terminal: str) -> list[int] | None:
    """The states once a terminal is read, None where it cannot stand there."""
    while True:
        step = tables.steps.get(stack[-1], {}).get(terminal)
        if step is None or isinstance(step, int):
            return None if step is None else [*stack, step]
        size, _, symbol = step
        if size:
            del stack[-size:]
        stack.append(tables.gotos[stack[-1]][symbol])
        if stack[-1] == tables.end:
            return stack


def _accepted(tables: _Tables, stack: list[int]) -> frozenset[str]:
    """The terminals that can come next. LALR lookaheads alone would name some that cannot."""
    if not stack:
        return frozenset()
    return frozenset(
        t for t in tables.steps[stack[-1]] if _after(tables, stack.copy(), t) is not None
    )


def _end(tokens: Sequence[Token]) -> Token:
    last = tokens[-1]
    return Token("$END", "", last.source, last.end, last.end)


def parse_all(source: Source) -> tuple[syntax.Document, list[Diagnostic]]:
    """The items that could be parsed, and every mistake of syntax."""
    _, document, errors = parse_with_tokens(source)
    return document, errors


def parse_with_tokens(source: Source) -> tuple[list[Token], syntax.Document, list[Diagnostic]]:
    """As `parse_all`, and every token, comments and line ends included.

    Where the parser came by, a token's `type` says whether a word is a keyword or a name there.
    """
    raw, errors = scan(source, grammar().terminals)
    spelling_lines = {e.span.line for e in errors if e.span}
    items: list[syntax.Item] = []
    at = 0
    while at < len(raw) and len(errors) < _MOST_ERRORS:
        try:
            items += _parse(raw[at:])
            break
        except _Stop as stop:
            span = stop.diagnostic.span
            if span is None or span.line not in spelling_lines:
                errors.append(stop.diagnostic)
            offset = span.start if span else 0
            failed = next((i for i, t in enumerate(raw) if t.start >= offset), len(raw))
            before = next((i for i in range(failed, at, -1) if _starts_item(raw, i)), at)
            if before > at:
                items += _quietly(raw[at:before])
            at = next((i for i in range(failed + 1, len(raw)) if _starts_item(raw, i)), len(raw))
    return raw, syntax.Document(source, tuple(items)), errors


def expected_at_end(source: Source) -> frozenset[str]:
    """The terminals that can come next after a text that may stop anywhere.

    What stands before the item at the end does not matter, nor whether it is right.

    >>> sorted(expected_at_end(Source("a.graft", "rule r {\\n  match a = mlp in ")))
    ['BLOCKS', 'NAME']
    """
    raw, _ = scan(source, grammar().terminals)
    start = next((i for i in reversed(range(len(raw))) if _starts_item(raw, i)), 0)
    tokens = lay_out(raw[start:])
    while tokens and tokens[-1].type == "NL" and raw[-1].type != "NL":
        tokens.pop()  # supplied: the line has not ended yet
    tables = _tables("start")
    stack: list[int] | None = [tables.start]
    for token in tokens:
        kind = token.type
        if token.keyword is not None and token.keyword in tables.steps[stack[-1]]:
            kind = token.keyword
        stack = _after(tables, stack, kind)
        if stack is None or len(stack) > _DEEPEST_STACK:
            return frozenset()
    return _accepted(tables, stack)


def _parse(raw: Sequence[Token]) -> tuple[syntax.Item, ...]:
    tokens = lay_out(raw)
    return _drive(tokens, "start") if tokens else ()


def _quietly(raw: Sequence[Token]) -> tuple[syntax.Item, ...]:
    try:
        return _parse(raw)
    except _Stop:  # the item before the mistake was not closed: its error stands already
        return ()


def _starts_item(raw: Sequence[Token], at: int) -> bool:
    """Whether a word of `ITEM_WORDS` stands at the left margin: a likely start after an error."""
    if at >= len(raw):
        return False
    token = raw[at]
    return token.value in ITEM_WORDS and (at == 0 or raw[at - 1].type == "NL") and _at_margin(token)


def _at_margin(token: Token) -> bool:
    return token.start == 0 or token.source.text[token.start - 1] == "\n"


def parse(source: Source) -> syntax.Document:
    """The document. Raises GraftError with every mistake of syntax.

    >>> document = parse(Source("a.graft", "rule r {\\n match a = mlp in blocks odd\\n remove a\\n}"))
    >>> [type(item).__name__ for item in document.items]
    ['RuleItem']
    >>> parse(Source("a.graft", "rule r {\\n  remove }"))
    Traceback (most recent call last):
        ...
    graftc.diagnostics.diagnostic.GraftError: error[G010]: unexpected `}`
      --> a.graft:2:10
       |
     2 |   remove }
       |          ^
       = wanted: a name
    """
    document, errors = parse_all(source)
    if errors:
        raise GraftError(*errors)
    return document


def parse_set_value(source: Source) -> syntax.SetValue:
    """The value of `--set name=value`. Raises GraftError."""
    raw, errors = scan(source, grammar().terminals)
    tokens = lay_out(raw)
    if not errors and tokens:
        try:
            return _drive(tokens[:-1], "set_value")
        except _Stop as stop:
            errors.append(stop.diagnostic)
    raise GraftError(*(errors or [no_value(source)]))
