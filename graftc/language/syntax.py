"""The syntax tree: what was written and where, with no meaning yet.

Every node has a `span`. Expression nodes also have a `depth`, so that the builder can refuse
what a recursive reader could not walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Union

from graftc.diagnostics import Source, Span

# -- expressions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Name:
    """A word; also a number's place where a parameter stands for one (`first n`)."""

    text: str
    span: Span
    depth: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Number:
    """`8`, `8k`, `1e-3`; `value` is an int where the number is whole."""

    value: int | float
    span: Span
    depth: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Percent:
    """`10%`; `value` is the fraction, 0.1."""

    value: float
    span: Span
    depth: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Text:
    """`"…"`, unquoted."""

    value: str
    span: Span
    depth: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Path:
    """`a`, `a.q`, `b.attention.out`."""

    names: tuple[Name, ...]
    span: Span
    depth: ClassVar[int] = 1

    @property
    def text(self) -> str:
        return ".".join(n.text for n in self.names)


@dataclass(frozen=True, slots=True)
class Spread:
    """`args…`."""

    name: Name
    span: Span
    depth: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Named:
    """`kernel = 4` in a call."""

    name: Name
    value: Expr
    span: Span

    @property
    def depth(self) -> int:
        return self.value.depth


@dataclass(frozen=True, slots=True)
class Call:
    """`op(…)`; `head` is `Alternatives` in a dataflow pattern."""

    head: Path | Alternatives
    arguments: tuple[Argument, ...]
    span: Span
    depth: int = 1

    @property
    def positional(self) -> tuple[Expr, ...]:
        return tuple(a for a in self.arguments if not isinstance(a, (Named, Spread)))

    @property
    def named(self) -> tuple[Named, ...]:
        return tuple(a for a in self.arguments if isinstance(a, Named))


@dataclass(frozen=True, slots=True)
class Unary:
    """`not x`, `-x`."""

    op: str
    operand: Expr
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Binary:
    """`x OP y`."""

    op: str
    left: Expr
    right: Expr
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class IsKind:
    """`scale is number`."""

    value: Expr
    kind: Name
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class HasShape:
    """`shape(q) ~ [b, h, n, d]`."""

    value: Expr
    shape: ListOf
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Maybe:
    """`maybe dropout(p)`."""

    value: Expr
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Alternatives:
    """`(matmul | bmm)`."""

    choices: tuple[Expr, ...]
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class DimProduct:
    """`(h d)` in a shape."""

    names: tuple[Name, ...]
    span: Span
    depth: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class ListOf:
    """`[b, h, n, d]`."""

    items: tuple[Expr | DimProduct | Spread, ...]
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class RangeItem:
    """`8..20 step 2` between braces."""

    first: Expr
    last: Expr
    step: Expr | None
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Pair:
    """`text: full` between braces."""

    key: Name
    value: Expr
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Braces:
    """`{…}`: a block set, a list of values or a map, as the place wants."""

    items: tuple[Expr | RangeItem | Pair, ...]
    span: Span
    depth: int = 1


Expr = Union[
    Name,
    Number,
    Percent,
    Text,
    Path,
    Call,
    Unary,
    Binary,
    IsKind,
    HasShape,
    Maybe,
    Alternatives,
    Braces,
    ListOf,
]
Argument = Union[Expr, Named, Spread]

# -- block sets ------------------------------------------------------------------------------

Count = Union[Number, Name]


@dataclass(frozen=True, slots=True)
class BlockWord:
    word: Literal["all", "odd", "even"]
    span: Span


@dataclass(frozen=True, slots=True)
class BlockEnd:
    """`first 14`, `last half`; `amount` None is `half`."""

    first: bool
    amount: Count | Percent | None
    span: Span


@dataclass(frozen=True, slots=True)
class BlockRange:
    """`8..20 step 2`; `last` None where one number or name stands alone."""

    first: Count
    last: Count | None
    step: Count | None
    span: Span


@dataclass(frozen=True, slots=True)
class BlockEvery:
    """`3 of every 4 from 1`."""

    count: Count
    period: Count
    start: Count | None
    span: Span


@dataclass(frozen=True, slots=True)
class BlockMeasured:
    """`bottom 6 by influence`."""

    top: bool
    amount: Count | Percent | None
    measure: Path | Call
    span: Span


@dataclass(frozen=True, slots=True)
class BlockExcept:
    base: BlockSet
    excluded: Braces | BlockRange
    span: Span


BlockSet = Union[BlockWord, BlockEnd, BlockRange, BlockEvery, BlockMeasured, BlockExcept, Braces]
SetValue = Union[BlockSet, Percent, Text, Number]


@dataclass(frozen=True, slots=True)
class Choice:
    """`of "name" 8..20`."""

    chain: Text | None
    blocks: BlockSet
    span: Span


# -- statements of dataflow patterns and operators --------------------------------------------


@dataclass(frozen=True, slots=True)
class Assign:
    targets: tuple[Name, ...]
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Returns:
    values: tuple[Expr, ...]
    span: Span


Statement = Union[Assign, Returns]


@dataclass(frozen=True, slots=True)
class Type:
    """`tokens[n, dim]`."""

    name: Name
    shape: ListOf | None
    span: Span


@dataclass(frozen=True, slots=True)
class Typed:
    name: Name
    type: Type
    span: Span


@dataclass(frozen=True, slots=True)
class Parameter:
    """`kernel = 4` in an operator's head."""

    name: Name
    default: Expr | None
    span: Span


# -- clauses ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MatchItem:
    """One line of `match`. `kind` says which of the other fields are set.

    role, path, class: `what`; pair and run: `length`; then: `roles`.
    """

    kind: Literal["role", "path", "class", "pair", "run", "then"]
    names: tuple[Name, ...]
    span: Span
    what: Name | Text | None = None
    roles: tuple[Name, ...] = ()
    length: Count | None = None
    within: tuple[Name, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class MatchSites:
    items: tuple[MatchItem, ...]
    span: Span
    keyword: ClassVar[str] = "match"


@dataclass(frozen=True, slots=True)
class MatchDataflow:
    statements: tuple[Statement, ...]
    span: Span
    keyword: ClassVar[str] = "match"


@dataclass(frozen=True, slots=True)
class MatchPython:
    function: Text
    span: Span
    keyword: ClassVar[str] = "match"


@dataclass(frozen=True, slots=True)
class Where:
    conditions: tuple[Expr, ...]
    span: Span
    keyword: ClassVar[str] = "where"


@dataclass(frozen=True, slots=True)
class ReplaceClause:
    """`replace a with op(…)`; no names where a group is replaced; `one_of` for candidates."""

    names: tuple[Name, ...]
    value: Expr
    one_of: bool
    span: Span
    keyword: ClassVar[str] = "replace"


@dataclass(frozen=True, slots=True)
class RewriteClause:
    statements: tuple[Statement, ...]
    span: Span
    keyword: ClassVar[str] = "rewrite"


@dataclass(frozen=True, slots=True)
class SiteClause:
    """`remove a`, `skip b`."""

    keyword: Literal["remove", "skip"]
    name: Name
    span: Span


@dataclass(frozen=True, slots=True)
class InsertClause:
    value: Expr
    after: Name
    span: Span
    keyword: ClassVar[str] = "insert"


@dataclass(frozen=True, slots=True)
class InitItem:
    """`slot = source`, or a source for the whole operator."""

    slot: Name | None
    source: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class InitClause:
    items: tuple[InitItem, ...]
    span: Span
    keyword: ClassVar[str] = "init"


@dataclass(frozen=True, slots=True)
class Option:
    """`samples = 8k`, or the word `l1`."""

    name: Name
    value: Expr | None
    span: Span


@dataclass(frozen=True, slots=True)
class DistillClause:
    options: tuple[Option, ...]
    span: Span
    keyword: ClassVar[str] = "distill"


@dataclass(frozen=True, slots=True)
class ExpectClause:
    """`expect 14`; `value` None is `all`."""

    value: Count | None
    span: Span
    keyword: ClassVar[str] = "expect"


@dataclass(frozen=True, slots=True)
class WordsClause:
    """`train inserted`, `drop mask, rotary`."""

    keyword: Literal["train", "drop"]
    names: tuple[Name, ...]
    span: Span


EditClause = Union[ReplaceClause, RewriteClause, SiteClause, InsertClause]
Clause = Union[
    MatchSites,
    MatchDataflow,
    MatchPython,
    Where,
    EditClause,
    InitClause,
    DistillClause,
    ExpectClause,
    WordsClause,
]

# -- items -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """`use std.mixers`, `use "file.graft"`, `use a, b from …`; `names` None brings all."""

    names: tuple[Name, ...] | None
    module: Path | Text
    span: Span


@dataclass(frozen=True, slots=True)
class SetItem:
    name: Name
    value: SetValue
    span: Span


@dataclass(frozen=True, slots=True)
class HeadWord:
    """`exact`, `repeat(measure)`, `after r, s` in a rule's head."""

    word: str
    span: Span
    names: tuple[Name, ...] = ()
    measure: Expr | None = None


@dataclass(frozen=True, slots=True)
class RuleItem:
    name: Name
    head: tuple[HeadWord, ...]
    summary: str
    clauses: tuple[Clause, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class OperatorItem:
    name: Name
    parameters: tuple[Parameter, ...]
    inputs: tuple[Typed, ...]
    results: tuple[Type, ...]
    statements: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class TestClause:
    """`before {…}`, `after {…}`, `inputs …`, `expect N`."""

    word: Literal["before", "after", "inputs", "expect"]
    span: Span
    statements: tuple[Statement, ...] = ()
    inputs: tuple[Typed | Named, ...] = ()
    expect: Count | None = None
    __test__: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class TestItem:
    """`test NAME of RULE { … }`."""

    name: Name
    rule: Name
    clauses: tuple[TestClause, ...]
    span: Span
    __test__: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class FinetuneItem:
    options: tuple[Option, ...]
    span: Span


Item = Union[Use, SetItem, RuleItem, OperatorItem, TestItem, FinetuneItem]


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file, in the order it was written."""

    source: Source
    items: tuple[Item, ...] = field(default=())
