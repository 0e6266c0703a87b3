"""Edits: what a matched site becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftc.diagnostics import Note, fail
from graftc.language import syntax as s
from graftc.language.expressions import typed
from graftc.language.resolve_call import check_constant_options, copy_of, operator_call
from graftc.language.resolve_dataflow import dataflow_rewrite
from graftc.language.rules import (
    Branch,
    BranchPart,
    BranchSite,
    Edit,
    Insert,
    Literal_,
    OneOf,
    OperatorCall,
    Parallel,
    Remove,
    Replace,
    Skip,
)
from graftc.language.scope import Scope, already, listed, suggest
from graftc.language.vocabulary import BLOCK_PARTS
from graftc.operators.spec import OperatorSpec, Value

_PARALLEL = ("merge", "norm")
_NORMS = ("first",)


@dataclass(frozen=True)
class Edited:
    """An edit, and the spec that its `init` slots are of (None: not known)."""

    edit: Edit
    spec: OperatorSpec | None = None


def edit_of(scope: Scope, clause: s.EditClause, inits: Sequence[s.InitItem] = ()) -> Edited:
    """The edit of a rule; a rewrite's `init` gives parameters that it reads. Raises GraftError."""
    match clause:
        case s.ReplaceClause():
            return _replace(scope, clause)
        case s.RewriteClause():
            return Edited(dataflow_rewrite(scope, clause, inits))
        case s.InsertClause():
            return _insert(scope, clause)
        case s.SiteClause(keyword="skip"):
            return _skip(scope, clause)
        case s.SiteClause():
            scope.binding(clause.name)
            return Edited(Remove(clause.name.text, clause.span))


def _skip(scope: Scope, clause: s.SiteClause) -> Edited:
    binding = scope.binding(clause.name)
    if binding.role not in (None, "block"):
        fail(
            "G124",
            f"`skip` takes a block, and `{binding.name}` is bound to {binding.role}",
            span=clause.name.span,
            wanted="a name bound to a block",
            found=binding.role,
            notes=[Note("it is bound here", binding.span)],
            help=f"write `remove {binding.name}`: its branch then contributes zero",
        )
    return Edited(Skip(clause.name.text, clause.span))


def _insert(scope: Scope, clause: s.InsertClause) -> Edited:
    scope.binding(clause.after)
    node = clause.value
    if isinstance(node, s.Call) and _is_call(node, "copy"):
        return Edited(Insert(copy_of(scope, node), clause.after.text, clause.span))
    call = operator_call(scope, node, None)
    return Edited(Insert(call, clause.after.text, clause.span), _known(call))


def _replace(scope: Scope, clause: s.ReplaceClause) -> Edited:
    is_parallel = _is_call(clause.value, "parallel")
    if is_parallel and clause.names:
        names = ", ".join(n.text for n in clause.names)
        fail(
            "G120",
            "`parallel` names its own branches",
            span=clause.names[0].span,
            wanted="replace with parallel(…)",
            found=f"replace {names} with …",
            help="leave out the name: `replace with parallel(…)`",
        )
    if is_parallel:
        assert isinstance(clause.value, s.Call)
        return _parallel(scope, clause.value, clause)
    if not clause.names:
        bound = next(iter(scope.bindings), "a")
        fail(
            "G123",
            "which site is replaced?",
            span=clause.span,
            wanted="replace NAME with …",
            help=f"write `replace {bound} with {clause.value.span.text[:60]}`",
        )
    name, *others = clause.names
    if others:
        for bound in clause.names:
            scope.binding(bound)
        fail(
            "G120",
            "one site is replaced at a time",
            span=others[0].span,
            wanted="one name",
            found=f"{len(clause.names)} names",
            help="to put several on one input, write `replace with parallel(…)`",
        )
    binding = scope.binding(name)
    if clause.one_of:
        return _one_of_candidates(scope, clause, name.text, binding.role)
    call = operator_call(scope, clause.value, binding.role)
    return Edited(Replace(name.text, call, clause.span), _known(call))


def _known(call: OperatorCall) -> OperatorSpec | None:
    """The spec, if it is known without reading a Python file."""
    return call.spec if call.spec.user is None else None


def _one_of_candidates(
    scope: Scope, clause: s.ReplaceClause, name: str, role: str | None
) -> Edited:
    node = clause.value
    items = node.items if isinstance(node, s.Braces) else (node,)
    if len(items) < 2:
        fail(
            "G123",
            "`one of` chooses between two or more",
            span=node.span,
            wanted="one of {op(…), op(…), keep}",
        )
    found: list[OperatorCall | None] = []
    for item in items:
        with scope.log.attempt():
            if isinstance(item, (s.RangeItem, s.Pair)):
                fail("G120", "this is not an operator", span=item.span, wanted="op(…) or keep")
            first = next(
                (i for i in items if i is not item and i.span.text == item.span.text), None
            )
            if first is not None and first.span.start < item.span.start:
                message = f"`{item.span.text}` is a candidate twice"
                scope.log.add(already("G119", message, item.span, first.span, "leave one out"))
                continue
            if isinstance(item, s.Path) and item.text == "keep":
                found.append(None)
                continue
            found.append(operator_call(scope, item, role))
    first_spec = next((_known(c) for c in found if c is not None), None)
    return Edited(OneOf(name, tuple(found), clause.span), first_spec)


def _is_call(node: s.Expr, name: str) -> bool:
    return isinstance(node, s.Call) and isinstance(node.head, s.Path) and node.head.text == name


def _parallel(scope: Scope, node: s.Call, clause: s.ReplaceClause) -> Edited:
    branches: list[Branch] = []
    for value in node.positional:
        with scope.log.attempt():
            branches.append(_branch(scope, value, branches))
    merge, options, spec = _merge(scope, node)
    if len(node.positional) < 2:
        fail(
            "G123",
            "`parallel` takes two or more branches",
            span=node.span,
            wanted="parallel(a, b, merge = …)",
            found=f"{len(node.positional)}",
        )
    if merge == "lerp" and len(node.positional) != 2:
        fail(
            "G122",
            "`lerp` goes between two branches",
            span=node.span,
            wanted="2 branches",
            found=f"{len(node.positional)}",
            help="write `merge = linear`",
        )
    return Edited(Parallel(tuple(branches), merge, options, clause.span), spec)


def _branch(scope: Scope, node: s.Expr, earlier: list[Branch]) -> Branch:
    if isinstance(node, s.Path) and len(node.names) == 1:
        scope.binding(node.names[0])
        branch: Branch = BranchSite(node.text, node.span)
    elif isinstance(node, s.Path):
        branch = _inner(scope, node)
    elif _is_call(node, "copy"):
        assert isinstance(node, s.Call)
        return copy_of(scope, node)
    else:
        first = earlier[0] if earlier else None
        role = scope.bindings[first.binding].role if isinstance(first, BranchSite) else None
        return operator_call(scope, node, role)
    for other in earlier:
        if not isinstance(other, OperatorCall) and other.span.text == branch.span.text:
            fail(
                "G119",
                f"`{node.text}` is a branch twice",
                span=node.span,
                notes=[Note("the first is here", other.span)],
                help=f"write `copy({node.text})` for a second one",
            )
    return branch


def _inner(scope: Scope, node: s.Path) -> BranchPart:
    binding = scope.binding(node.names[0])
    part = node.names[1]
    if len(node.names) > 2 or part.text not in BLOCK_PARTS or binding.role not in (None, "block"):
        wrong = binding.role not in (None, "block")
        fail(
            "G109",
            f"`{node.text}` is no site inside a block",
            span=node.span,
            wanted=f"{binding.name}.… one of {listed(BLOCK_PARTS)}",
            found=f"`{binding.name}` is bound to {binding.role}" if wrong else f"`{part.text}`",
            help=suggest(part.text, BLOCK_PARTS),
        )
    return BranchPart(binding.name, part.text, node.span)


def _merge(scope: Scope, node: s.Call) -> tuple[str, dict[str, Value], OperatorSpec | None]:
    merge: str | None = None
    options: dict[str, Value] = {}
    spec: OperatorSpec | None = None
    for argument in node.named:
        name, value = argument.name, argument.value
        if name.text not in _PARALLEL:
            fail(
                "G103",
                f"`parallel` has no argument `{name.text}`",
                span=name.span,
                wanted=listed(_PARALLEL),
                found=f"`{name.text}`",
                help=suggest(name.text, _PARALLEL),
            )
        if name.text == "norm":
            options["norm"] = _one_of(scope, value, _NORMS, "norm")
            continue
        if isinstance(value, s.Call) and isinstance(value.head, s.Path):
            merge = _known_merge(scope, value.head.text, value.head)
            spec = scope.merges[merge]
            given = check_constant_options(scope, value, spec)
            options |= {k: v.value for k, v in given.items() if isinstance(v, Literal_)}
        else:
            chosen = typed(scope, value, "symbol")
            merge = _known_merge(scope, str(getattr(chosen, "value", "")), value)
            spec = scope.merges[merge]
    if merge is None:
        fail(
            "G123",
            "`parallel` needs `merge`: how the outputs become one",
            span=node.head.span,
            wanted=f"merge = {listed(scope.merges)}",
            help="write `merge = sum`, or `merge = linear`",
        )
    start = options.get("start")
    if isinstance(start, (int, float)) and not 0 <= start <= 1:
        fail(
            "G122",
            "`start` lies between the two branches",
            span=node.span,
            wanted="0 to 1",
            found=str(start),
        )
    return merge, options, spec


def _known_merge(scope: Scope, name: str, node: s.Expr) -> str:
    if name not in scope.merges:
        fail(
            "G121",
            f"unknown merge `{name}`",
            span=node.span,
            wanted=listed(scope.merges),
            found=f"`{name}`",
            help=suggest(name, scope.merges),
        )
    return name


def _one_of(scope: Scope, node: s.Expr, choices: tuple[str, ...], what: str) -> Value:
    chosen = typed(scope, node, "symbol")
    value = chosen.value if isinstance(chosen, Literal_) else None
    if value not in choices:
        fail(
            "G121",
            f"`{what}` cannot be `{node.span.text}`",
            span=node.span,
            wanted=listed(choices),
            help=suggest(str(value), choices) or f"write `{choices[0]}`",
        )
    return value
