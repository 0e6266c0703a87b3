"""A file as an editor sees it: its tokens, what could be parsed, and where a token stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftc.diagnostics import GraftError, Source
from graftc.language import syntax as s
from graftc.language.load import Loader
from graftc.language.parser import parse_with_tokens
from graftc.language.syntax_errors import CLAUSE_WORDS, ITEM_WORDS
from graftc.language.tokens import Token
from graftc.language.vocabulary import ROLES

_OPEN = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_CLOSE = frozenset(_OPEN.values())


@dataclass(frozen=True)
class Call:
    """An open `head(`: the name before the bracket, and the arguments that are given by name."""

    head: str
    given: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where in the file a token or the cursor stands.

    `item` and `clause` are keywords, or empty. `before` are the tokens of the item up to here, without
    comments and line ends. `calls` are the open calls, innermost last. `name`: what `name =` just
    before gives a value to.
    """

    item: str
    clause: str
    before: tuple[Token, ...]
    calls: tuple[Call, ...]
    name: str = ""

    @property
    def last(self) -> str:
        return self.before[-1].value if self.before else ""


@dataclass(frozen=True)
class Bound:
    """A name of a `match` clause; `role` is None for a path, a class or a dataflow value."""

    token: Token
    role: str | None


@dataclass(frozen=True)
class Page:
    """The text of a file, read as far as it can be."""

    source: Source
    tokens: tuple[Token, ...]
    document: s.Document

    @staticmethod
    def read(name: str, text: str) -> Page:
        """`name` is the file's path: `use "…"` looks beside it."""
        source = Source(name, text)
        tokens, document, _ = parse_with_tokens(source)
        return Page(source, tuple(tokens), document)

    def token_at(self, offset: int) -> int | None:
        """The index of the word or text at an offset; also just behind its end, as a cursor is.

        >>> page = Page.read("a.graft", "set n = 4")
        >>> page.tokens[page.token_at(5)].value
        'n'
        """
        found = [
            i
            for i, t in enumerate(self.tokens)
            if t.start <= offset <= t.end and t.type not in ("NL", "COMMENT")
        ]
        words = [i for i in found if self.tokens[i].value[:1].isalpha() or _is_word(self.tokens[i])]
        return (words or found or [None])[-1]

    def place(self, offset: int) -> Place:
        """Where an offset stands, by the tokens that end before it."""
        before = [t for t in self.tokens if t.end <= offset and t.type != "COMMENT"]
        start = _item_start(before)
        words = [t for t in before[start:] if t.type != "NL"]
        item = words[0].value if words and words[0].value in ITEM_WORDS else ""
        return Place(item, _clause(before[start:]), tuple(words), *_calls(words))

    def item_tokens(self, offset: int) -> list[Token]:
        """The tokens of the item that holds an offset, to its end."""
        head = [t for t in self.tokens if t.start <= offset and t.type != "COMMENT"]
        start = _item_start(head)
        rest = [t for t in self.tokens if t.type != "COMMENT"]
        end = next((i for i in range(len(head), len(rest)) if _starts_item(rest, i)), len(rest))
        return [t for t in rest[start:end] if t.type != "NL"]

    def bindings(self, offset: int) -> Mapping[str, Bound]:
        """The names that `match` binds in the rule that holds an offset."""
        found: dict[str, Bound] = {}
        tokens = self.item_tokens(offset)
        in_match, depth = False, 0
        for at, token in enumerate(tokens):
            depth += (token.type in _OPEN) - (token.type in _CLOSE)
            if token.keyword and token.value in CLAUSE_WORDS and depth == 1:
                in_match = token.value == "match"
            following = tokens[at + 1].value if at + 1 < len(tokens) else ""
            if in_match and following == "=" and token.value[:1].isidentifier():
                for name, role in _bound(tokens, at):
                    found.setdefault(name.value, Bound(name, role))
        return found

    def replaced_by(self, offset: int) -> str | None:
        """The operator of the rule's `replace … with OP`."""
        tokens = self.item_tokens(offset)
        for at, token in enumerate(tokens[:-1]):
            if token.value == "with" and token.keyword:
                return tokens[at + 1].value
        return None

    @cached_property
    def settings(self) -> Mapping[str, s.SetItem]:
        """The `set` parameters of this file and of those that it uses; its own win."""
        found: dict[str, s.SetItem] = {}
        for document in self.documents:
            for item in document.items:
                if isinstance(item, s.SetItem):
                    found.setdefault(item.name.text, item)
        return found

    @cached_property
    def rules(self) -> Mapping[str, s.RuleItem]:
        """The rules of this file and of those that it uses, by name."""
        found: dict[str, s.RuleItem] = {}
        for document in self.documents:
            for item in document.items:
                if isinstance(item, s.RuleItem):
                    found.setdefault(item.name.text, item)
        return found

    @cached_property
    def operators(self) -> Mapping[str, s.OperatorItem]:
        """The operators written in this file and in those that it uses, by name."""
        found: dict[str, s.OperatorItem] = {}
        for document in self.documents:
            for item in document.items:
                if isinstance(item, s.OperatorItem):
                    found.setdefault(item.name.text, item)
        return found

    @cached_property
    def documents(self) -> tuple[s.Document, ...]:
        """This file, then every file that it uses and that can be read."""
        loader = Loader()
        own = Path(self.source.name)
        found = [self.document]
        waiting = [(use, own.parent, (own.resolve(),)) for use in _uses(self.document)]
        while waiting:
            use, folder, chain = waiting.pop(0)
            try:
                path, document, _ = loader.used(use, folder, chain)
            except GraftError:  # `check` reports it, at the `use`
                continue
            if document not in found:
                found.append(document)
                waiting += [(u, path.parent, (*chain, path)) for u in _uses(document)]
        return tuple(found)

    def used_file(self, use: s.Use) -> s.Document | None:
        """The file that a `use` names, or None where there is none that can be read."""
        try:
            return Loader().used(use, Path(self.source.name).parent, ())[1]
        except GraftError:
            return None


def _uses(document: s.Document) -> list[s.Use]:
    return [i for i in document.items if isinstance(i, s.Use)]


def _is_word(token: Token) -> bool:
    return token.type == "STRING" or token.value[:1] == "_"


def _item_start(tokens: Sequence[Token]) -> int:
    return next((i for i in reversed(range(len(tokens))) if _starts_item(tokens, i)), 0)


def _starts_item(tokens: Sequence[Token], at: int) -> bool:
    token = tokens[at]
    margin = token.start == 0 or token.source.text[token.start - 1] == "\n"
    return margin and token.value in ITEM_WORDS


def _clause(tokens: Sequence[Token]) -> str:
    """The clause of a rule that the last token stands in; one that begins on the last line too."""
    depth, clause = 0, ""
    for at, token in enumerate(tokens):
        if token.type in _OPEN:
            depth += 1
        elif token.type in _CLOSE:
            depth = max(0, depth - 1)
        starts = at > 0 and tokens[at - 1].type in ("NL", "LBRACE", "RBRACE")
        option = at + 1 < len(tokens) and tokens[at + 1].type == "EQUAL"
        if depth == 1 and starts and token.value in CLAUSE_WORDS and not option:
            clause = token.value
    return clause if depth else ""


def _calls(tokens: Sequence[Token]) -> tuple[tuple[Call, ...], str]:
    """The calls that are open at the end, and the name that the next value is given to."""
    stack: list[tuple[str, list[str]]] = []
    name = ""
    for at, token in enumerate(tokens):
        if token.type in _OPEN:
            called = token.type == "LPAR" and at > 0 and tokens[at - 1].value[:1].isidentifier()
            stack.append((tokens[at - 1].value if called else "", []))
            name = ""
        elif token.type in _CLOSE:
            if stack:
                stack.pop()
            name = ""
        elif token.type == "EQUAL" and at > 0:
            name = tokens[at - 1].value
            if stack:
                stack[-1][1].append(name)
        elif token.type == "COMMA":
            name = ""
    return tuple(Call(head, tuple(given)) for head, given in stack if head), name


def _bound(tokens: Sequence[Token], last: int) -> list[tuple[Token, str | None]]:
    """The names that end at `last` (before `=`), each with its role."""
    names = [tokens[last]]
    at = last - 1
    while at > 0 and tokens[at].type == "COMMA" and tokens[at - 1].value[:1].isidentifier():
        names.insert(0, tokens[at - 1])
        at -= 2
    value = tokens[last + 2 : last + 3]
    first = value[0].value if value else ""
    if first == "each":
        return [(n, "block") for n in names]
    roles = [first if first in ROLES else None]
    at = last + 3
    while at + 1 < len(tokens) and tokens[at].value == "then":
        roles.append(tokens[at + 1].value)
        at += 2
    return [(n, roles[i] if i < len(roles) else roles[0]) for i, n in enumerate(names)]
