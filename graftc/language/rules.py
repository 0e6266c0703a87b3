"""What a `.graft` file means: resolved rules, free of syntax.

The resolver makes these from the syntax tree; the rewriter reads them. Names are resolved,
`set` parameters are substituted, operators and their arguments are checked against their
specs, block sets are still symbolic (a chain's length is not known without a model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

from graftc.diagnostics import Diagnostic, Span
from graftc.operators.spec import Const, InitSource, OperatorSpec, Part, UserClass, Value

# -- expressions of `where` and of arguments -------------------------------------------------


@dataclass(frozen=True)
class Literal_:
    """A number, a string, a symbol or a boolean."""

    value: Value
    span: Span


@dataclass(frozen=True)
class Fact:
    """A named predicate over a binding: `tokens(a)`, `locality(a, band = 32)`."""

    name: str
    binding: str
    options: Mapping[str, Value]
    span: Span


@dataclass(frozen=True)
class Operation:
    """`+ - * / % == != < <= > >= and or not min max neg` over expressions."""

    op: str
    args: tuple[Expr, ...]
    span: Span


Expr = Union[Literal_, Fact, Operation]

# -- which blocks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """`first..last step n`, both ends in; or one index where first == last."""

    first: int
    last: int
    step: int
    span: Span


@dataclass(frozen=True)
class Blocks:
    """A block set of a chain. `chain` is the name after `of`, or None for the only chain.

    `kind`: 'all', 'odd', 'even', 'first' (count), 'last' (count), 'ranges', 'every' (count of every
    period from start), 'measured' (top or bottom by a measure). `count` is a number of blocks, or a
    fraction of the chain in 0..1 where `fraction` is set (`half`, `50%`).
    """

    kind: Literal["all", "odd", "even", "first", "last", "ranges", "every", "measured"]
    span: Span
    chain: str | None = None
    chain_span: Span | None = None
    ranges: tuple[Range, ...] = ()
    count: float = 0
    fraction: bool = False
    period: int = 1
    start: int = 0
    top: bool = True
    measure: Fact | None = None
    excluded: tuple[Range, ...] = ()


# -- what is matched -------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteMatch:
    """`a = ROLE [in ROLE] [in blocks …]`, `a = module "glob"`, `a = class "name"`.

    Exactly one of `role`, `path`, `class_name` is set. `within` is a role the site must lie in
    (`linear in mlp in blocks all`). `what_span`, `within_span`: where the role, path or class and the roles around stand.
    """

    binding: str
    span: Span
    role: str | None = None
    path: str | None = None
    class_name: str | None = None
    within: tuple[str, ...] = ()
    blocks: Blocks | None = None
    what_span: Span | None = None
    within_span: Span | None = None


@dataclass(frozen=True)
class GroupMatch:
    """`a, b = each pair of blocks …`, `a, b, c = each run of 3 blocks …`: neighbours in the data flow."""

    bindings: tuple[str, ...]
    blocks: Blocks
    span: Span


# -- dataflow: patterns and what they become ---------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """A value by its name: what a pattern reads or binds, or a number that it captures."""

    name: str
    span: Span


@dataclass(frozen=True)
class Constant:
    """A number, word, `true`, `false` or `none` that must stand there."""

    value: Value
    span: Span


@dataclass(frozen=True)
class ListTerm:
    """`[b, h, n, d]`: a list of sizes or dims, or of values (`cat([x, y], -1)`)."""

    items: tuple[Term, ...]
    span: Span


@dataclass(frozen=True)
class SpreadTerm:
    """`args…`: all the arguments that are left, however many."""

    name: str
    span: Span


@dataclass(frozen=True)
class OpTerm:
    """An op. `ops`: its name, or several where any may stand (`(matmul | bmm)(p, v)`).

    Names are those of `graftc.language.dataflow_ops.OPS`, or `aten.NAME.OVERLOAD`. `args` are in the order
    of the (first) op's signature, None where an argument is not given and so has its default; an op by its
    ATen name has its positional arguments there and the others in `named`.
    """

    ops: tuple[str, ...]
    args: tuple[Term | None, ...]
    span: Span
    op_span: Span
    named: tuple[tuple[str, Term], ...] = ()


@dataclass(frozen=True)
class SiteTerm:
    """A bound site as an op: `a(x)`; `args` None where its name alone stands for its output."""

    binding: str
    args: tuple[Term, ...] | None
    span: Span


@dataclass(frozen=True)
class MaybeTerm:
    """`maybe dropout(p)`: the op on its first argument, or that argument itself."""

    value: Term
    span: Span


@dataclass(frozen=True)
class EitherTerm:
    """`(x * s | x / s)`: any of the choices, tried in the order written."""

    choices: tuple[Term, ...]
    span: Span


@dataclass(frozen=True)
class NotTerm:
    """`not dropout(p)`: any value but one that is made so."""

    value: Term
    span: Span


Term = Union[Ref, Constant, ListTerm, SpreadTerm, OpTerm, SiteTerm, MaybeTerm, EitherTerm, NotTerm]


@dataclass(frozen=True)
class Binds:
    """`q, k, v = split(y, 3)`: one name for the value, or a name for each of its results."""

    targets: tuple[Ref, ...]
    value: Term
    span: Span


@dataclass(frozen=True)
class ShapeDim:
    """One dimension of a shape guard: names whose product it is, a number, or `rest…`."""

    names: tuple[str, ...]
    span: Span
    number: int | None = None
    rest: bool = False


@dataclass(frozen=True)
class ShapeGuard:
    """`shape(q) ~ [b, h, n, d]`: the same name is the same size in all guards of a rule."""

    name: str
    dims: tuple[ShapeDim, ...]
    span: Span


@dataclass(frozen=True)
class KindGuard:
    """`scale is number`, `w is parameter`, `mask is none`, `x is tensor`; `negated` after `not`."""

    name: str
    kind: Literal["number", "parameter", "tensor", "none"]
    span: Span
    negated: bool = False


ValueGuard = Union[ShapeGuard, KindGuard]


@dataclass(frozen=True)
class DataflowMatch:
    """`match { … }`: ops on one another; every name is a value of the graph."""

    statements: tuple[Binds, ...]
    span: Span


@dataclass(frozen=True)
class PythonMatch:
    """`match python("file.py:function")`: the pattern is what the function does to its arguments.

    `inputs` and `outputs` are names: of its parameters, and of what it returns. `graftc.rewrite.user_files`
    makes a DataflowMatch of it, once the file may be imported.
    """

    user: UserClass
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    span: Span


@dataclass(frozen=True)
class NewParameter:
    """`init w = cat(wq, wk, wv)` of a dataflow rule: a parameter that its rewrite reads, and its value."""

    name: str
    value: Term
    span: Span


@dataclass(frozen=True)
class Rewrite:
    """`rewrite { … }`: names that the pattern binds get new values; others are inner to the rewrite.

    `outputs`: the pattern's names that are written. `new`: parameters that `init` gives.
    """

    statements: tuple[Binds, ...]
    outputs: tuple[str, ...]
    span: Span
    new: tuple[NewParameter, ...] = ()


@dataclass(frozen=True)
class Measure:
    """What falls at each step of a `repeat` rule: `ops`, `params`, `flops`, or `count(OP)`, the ops of that name."""

    kind: Literal["ops", "params", "flops", "count"]
    span: Span
    op: str = ""


@dataclass(frozen=True)
class SequenceMatch:
    """`a, m = self_attention then mlp [in ROLE] [in blocks …]`: sites that feed each other, in the data flow.

    `roles` are in the order of `bindings`; between two of them lies no other site of these roles.
    """

    bindings: tuple[str, ...]
    roles: tuple[str, ...]
    span: Span
    within: tuple[str, ...] = ()
    blocks: Blocks | None = None


Match = Union[SiteMatch, GroupMatch, SequenceMatch, DataflowMatch, PythonMatch]

# -- what it becomes -------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorCall:
    """An operator with its arguments; an argument not given is filled from the spec at plan time."""

    spec: OperatorSpec
    arguments: Mapping[str, Expr]
    span: Span


@dataclass(frozen=True)
class BranchPart:
    """`b.attention`, `b.mlp`: a site inside a bound block."""

    binding: str
    part: str
    span: Span


@dataclass(frozen=True)
class BranchSite:
    """A bound site as a branch of `parallel`."""

    binding: str
    span: Span


@dataclass(frozen=True)
class CopyOf:
    """`copy(b, zero = {b.attention.out})`: a block's copy, its weights its own; `zero` start at zero."""

    binding: str
    span: Span
    zero: tuple[Part, ...] = ()


Branch = Union[BranchSite, BranchPart, CopyOf, OperatorCall]


@dataclass(frozen=True)
class Replace:
    """`replace a with op(…)`."""

    binding: str
    operator: OperatorCall
    span: Span


@dataclass(frozen=True)
class Parallel:
    """`replace with parallel(r1, …, rk, merge = sum | linear | lerp)`: all read r1's input."""

    branches: tuple[Branch, ...]
    merge: str
    options: Mapping[str, Value]
    span: Span


@dataclass(frozen=True)
class OneOf:
    """`replace a with one of {op(…), keep, …}`: candidates in order; None is `keep`."""

    binding: str
    candidates: tuple[OperatorCall | None, ...]
    span: Span


@dataclass(frozen=True)
class Insert:
    """`insert op(…) after a`, `insert copy(b) after b`: what follows `a` reads the new one's output."""

    new: OperatorCall | CopyOf
    after: str
    span: Span


@dataclass(frozen=True)
class Remove:
    """`remove a`: the branch contributes zero."""

    binding: str
    span: Span


@dataclass(frozen=True)
class Skip:
    """`skip b`: the block becomes the identity on the residual stream."""

    binding: str
    span: Span


Edit = Union[Replace, OneOf, Parallel, Insert, Remove, Skip, Rewrite]

# -- training words --------------------------------------------------------------------------


@dataclass(frozen=True)
class Distill:
    """Stage 1 of a rule's sites. Counts are plain numbers; None is the engine's default.

    `inputs` is the share of the student's own inputs at the first step and at the last.
    """

    loss: Literal["l1", "l2", "huber", "auto"]
    span: Span
    samples: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    weight: float = 1.0
    delta: float = 1.0
    train: str | None = None
    data_fraction: float | None = None
    gate: bool = False
    mask_above: float | None = None
    inputs: tuple[float, float] = (0.0, 0.0)
    clip: float | None = None
    patience: int | None = None


@dataclass(frozen=True)
class Lora:
    rank: int
    alpha: float | None = None


@dataclass(frozen=True)
class Finetune:
    """Stage 2."""

    span: Span
    data_fraction: float | None = None
    samples: int | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    warmup: int | None = None
    ema: float | None = None
    clip: float | None = None
    halve_lr_at: tuple[int, ...] = ()
    train: Literal["all", "inserted"] | Lora | None = None
    task: float | None = None
    teacher: float | None = None
    features: float | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    checkpointing: bool | None = None
    preview: int | None = None


@dataclass(frozen=True)
class Computed(Const):
    """A number of an init source that depends on a site's facts (`groups = heads(a) / 4`).

    `value` is None until the facts are known: evaluate `expr`, and use `Const` of the result.
    """

    expr: Expr


@dataclass(frozen=True)
class Init:
    """`slot = source`; `slot` None where the source fills the whole operator (`keep_top(m, …)`)."""

    slot: str | None
    source: InitSource
    span: Span


@dataclass(frozen=True)
class Rule:
    """One rule, resolved."""

    name: str
    span: Span
    matches: tuple[Match, ...]
    edit: Edit
    contract: Literal["exact", "approx", "learned"] = "approx"
    summary: str = ""
    where: Expr | None = None
    inits: tuple[Init, ...] = ()
    distill: Distill | None = None
    expect: int | Literal["all"] | None = None
    expect_span: Span | None = None
    after: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    train_inserted: bool = False
    guards: tuple[ValueGuard, ...] = ()
    repeat: Measure | None = None


@dataclass(frozen=True)
class GraphInput:
    """`x: tensor[2, 8]`, a random input of a test's graph, or `w: weight[4, 8]`, a parameter of it."""

    name: str
    kind: Literal["tensor", "weight"]
    shape: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class GraphTest:
    """`test NAME of RULE { … }`: the rule on a small graph. `outputs`: the values that the graph returns."""

    name: str
    rule: Rule
    inputs: tuple[GraphInput, ...]
    numbers: Mapping[str, int | float]
    before: tuple[Binds, ...]
    outputs: tuple[str, ...]
    span: Span
    after: tuple[Binds, ...] | None = None
    after_span: Span | None = None
    expect: int | None = None
    expect_span: Span | None = None


@dataclass(frozen=True)
class Rules:
    """All rules of a file and of what it uses, in order, and stage 2.

    `digest` hashes every text read. `python`: Python files that were imported for it, with their SHA-256.
    `notes` are remarks that stop nothing: what parses and cannot
    be applied yet.
    """

    rules: tuple[Rule, ...]
    finetune: Finetune | None
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    files: tuple[str, ...] = ()
    digest: str = ""
    python: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[Diagnostic, ...] = ()
    tests: tuple[GraphTest, ...] = ()
