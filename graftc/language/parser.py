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

Table = Mapping[int, Mapping[str, tuple[Any, Any]]]

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


@lru_cache(maxsize=2)
def _tables(start: str) -> Any:
    """Lark's tables for a start symbol: `states`, `start_state`, `end_state`, `callbacks`."""
    lark = cast(Any, grammar().lark)  # Lark's types leave the parser's state open
    return lark.parse_interactive(start=start).parser_state.parse_conf


def _drive(tokens: Sequence[Token], start: str) -> Any:
    """The result of the start symbol. Raises `_Stop`."""
    tables = _tables(start)
    table: Table = tables.states
    stack: list[int] = [tables.start_state]
    earlier, before = stack, stack
    values: list[Any] = []
    at = 0
    try:
        for at, token in enumerate((*tokens, _end(tokens))):
            earlier, before = before, stack.copy()
            if len(stack) > _DEEPEST_STACK:
                raise _Stop(at, nested_too_deep(token.span))
            kind = token.type
            if token.keyword is not None:
                kind = token.type = token.keyword if token.keyword in table[stack[-1]] else "NAME"
            while stack[-1] != tables.end_state:
                step = table[stack[-1]].get(kind)
                if step is None:
                    wanted = _accepted(table, before, tables.end_state)
                    sooner = _accepted(table, earlier, tables.end_state)
                    raise _Stop(at, unexpected(tokens, at, wanted, sooner, start))
                action, target = step
                if action is Shift:
                    stack.append(target)
                    values.append(token)
                    break
                size = len(target.expansion)
                children = values[len(values) - size :]
                if size:
                    del stack[-size:], values[-size:]
                values.append(tables.callbacks[target](children))
                stack.append(table[stack[-1]][target.origin.name][1])
        return values[-1]
    except GraftError as error:  # the builder found it nested too deep
        raise _Stop(at, error.diagnostics[0]) from None


def _accepted(table: Table, stack: list[int], end_state: int) -> frozenset[str]:
    """The terminals that can come next. LALR lookaheads alone would name some that cannot."""
    if not stack:
        return frozenset()
    return frozenset(t for t in table[stack[-1]] if _shifts(table, stack, t, end_state))


def _shifts(table: Table, stack: list[int], terminal: str, end_state: int) -> bool:
    if not (terminal.isupper() or terminal == "$END"):
        return False
    states = stack.copy()
    while states[-1] in table and terminal in table[states[-1]]:
        action, target = table[states[-1]][terminal]
        if action is Shift:
            return True
        if target.expansion:
            del states[-len(target.expansion) :]
        states.append(table[states[-1]][target.origin.name][1])
        if states[-1] == end_state:
            return True
    return False


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
    table: Table = tables.states
    stack: list[int] = [tables.start_state]
    for token in tokens:
        kind = token.type
        if token.keyword is not None and token.keyword in table[stack[-1]]:
            kind = token.keyword
        while True:
            step = table[stack[-1]].get(kind)
            if step is None:
                return frozenset()
            action, target = step
            if action is Shift:
                stack.append(target)
                break
            if target.expansion:
                del stack[-len(target.expansion) :]
            stack.append(table[stack[-1]][target.origin.name][1])
        if len(stack) > _DEEPEST_STACK:
            return frozenset()
    return _accepted(table, stack, tables.end_state)


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
