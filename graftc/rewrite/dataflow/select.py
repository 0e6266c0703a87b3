"""Which occurrences of a rule's pattern are its matches: guards, leaks, and no op taken twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from graftc.diagnostics import fail
from graftc.language.evaluate import holds
from graftc.language.rules import (
    DataflowMatch,
    Fact,
    KindGuard,
    Rewrite,
    Rule,
    ShapeGuard,
)
from graftc.operators.spec import Value
from graftc.program.flat import Op, common_path
from graftc.program.program import size_hint
from graftc.rewrite.dataflow.matcher import occurrences
from graftc.rewrite.dataflow.occurrence import Leak, Occurrence, SiteValue, leak
from graftc.rewrite.dataflow.pattern import Pattern, patterns_of
from graftc.rewrite.dataflow.view import ProgramView
from graftc.rewrite.facts import site_fact

MOST_TRIED = 1_000_000


@dataclass(frozen=True)
class Turned:
    """An occurrence that is no match: where, why, and for a leak the value and its user."""

    path: str
    reason: str
    occurrence: Occurrence
    leak: Leak | None = None


def rule_patterns(rule: Rule) -> tuple[Pattern, ...]:
    """All clauses of a dataflow rule as one pattern, in every way to take its choices."""
    clauses = [m for m in rule.matches if isinstance(m, DataflowMatch)]
    statements = tuple(s for c in clauses for s in c.statements)
    rewrite = rule.edit if isinstance(rule.edit, Rewrite) else None
    return patterns_of(DataflowMatch(statements, clauses[0].span), rewrite)


def select_occurrences(
    rule: Rule,
    patterns: tuple[Pattern, ...],
    view: ProgramView,
    sites: Mapping[str, Mapping[Op, SiteValue]] | None = None,
) -> tuple[list[Occurrence], list[Turned]]:
    """The matches of a dataflow rule, and the occurrences that are none, with the reason.

    Where two overlap, the one that comes first in the order of execution is taken.
    """
    found: list[Occurrence] = []
    turned: list[Turned] = []
    claimed: set[int] = set()
    seen: set[frozenset[int]] = set()
    tried = 0
    for pattern in patterns:
        for occurrence in occurrences(pattern, view, sites, claimed):
            tried += 1
            if tried > MOST_TRIED:
                fail(
                    "G387",
                    f"rule `{rule.name}` has more than {MOST_TRIED:,} occurrences",
                    span=rule.span,
                    help="say more of what is wanted in the pattern",
                )
            ops = frozenset(v.index for v in occurrence.values)
            if ops in seen:
                continue  # the same ops with their names the other way round
            sizes: dict[str, Any] = {}
            occurrence = replace(occurrence, sizes=sizes)  # the guards fill it
            reason, leaked = _objection(rule, occurrence, view, sizes)
            if reason is None:
                found.append(occurrence)
                seen.add(ops)
                claimed |= {id(occurrence.values[i]) for i in claimed_nodes(pattern)}
            else:
                turned.append(Turned(place(occurrence), reason, occurrence, leaked))
    done = {frozenset(v.index for v in o.values) for o in found}
    kept = [t for t in turned if frozenset(v.index for v in t.occurrence.values) not in done]
    return sorted(found, key=_order), _one_each(kept)


def claimed_nodes(pattern: Pattern) -> frozenset[int]:
    """The nodes that a match takes for itself: inner ones and those that are rewritten."""
    return pattern.inner | pattern.written


def _order(occurrence: Occurrence) -> tuple[int, ...]:
    return tuple(sorted(v.index for v in occurrence.values))


def _one_each(turned: list[Turned]) -> list[Turned]:
    seen: dict[frozenset[int], Turned] = {}
    for t in turned:
        seen.setdefault(frozenset(v.index for v in t.occurrence.values), t)
    return list(seen.values())


def place(occurrence: Occurrence) -> str:
    """Where an occurrence is, for people: `blocks.0.attn: o`."""
    path = common_path(list(occurrence.values)) or "(root)"
    node = occurrence.pattern.nodes[-1]
    return f"{path}: {node.names[0] if node.names else node.ops[0]} ({occurrence.values[-1].node.name})"


def _objection(
    rule: Rule, occurrence: Occurrence, view: ProgramView, sizes: dict[str, Any]
) -> tuple[str | None, Leak | None]:
    for guard in rule.guards:
        reason = (
            _kind_objection(guard, occurrence)
            if isinstance(guard, KindGuard)
            else _shape_objection(guard, occurrence, sizes)
        )
        if reason is not None:
            return reason, None
    if rule.where is not None:
        verdict = holds(rule.where, lambda f: value_fact(f, occurrence, sizes))
        if not verdict.ok:
            return verdict.reason, None
    leaked = leak(occurrence, view, view.returned)
    if leaked is not None:
        return leak_text(leaked), leaked
    if _is_circular(occurrence):
        return "a value that it reads depends on a value that it makes", None
    return None, None


def leak_text(leaked: Leak) -> str:
    """`p` (softmax in blocks.0.attn) is also used by `sum_1` in blocks.0.attn."""
    node, value = leaked.node, leaked.value
    name = f"`{node.names[0]}`" if node.names else f"the result of `{node.span.text}`"
    where = f"{name} ({value.node.name} in {value.path or 'the root'})"
    if leaked.user is None:
        return f"{where} is also returned by the model"
    return f"{where} is also used by `{leaked.user.node.name}` in {leaked.user.path or 'the root'}"


def _kind_objection(guard: KindGuard, occurrence: Occurrence) -> str | None:
    if _is_kind(occurrence.value(guard.name), guard.kind) is guard.negated:
        what = "a" if guard.kind != "none" else ""
        return f"{guard.name} is {'' if guard.negated else 'not '}{what} {guard.kind}".replace(
            "  ", " "
        )
    return None


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "none":
        return value is None
    if not isinstance(value, Op):
        return False
    return value.kind == "param" if kind == "parameter" else value.tensor is not None


def _shape_objection(
    guard: ShapeGuard, occurrence: Occurrence, sizes: dict[str, Any]
) -> str | None:
    value = occurrence.value(guard.name)
    tensor = value.tensor if isinstance(value, Op) else None
    if tensor is None:
        return f"{guard.name} is no tensor: it has no shape"
    shape = list(tensor.shape)
    dims = list(guard.dims)
    rest = next((i for i, d in enumerate(dims) if d.rest), None)
    if rest is not None:
        after = len(dims) - rest - 1
        if len(shape) < rest + after:
            return _shape_text(guard, shape)
        pairs = [*zip(dims[:rest], shape[:rest], strict=True)]
        pairs += zip(dims[rest + 1 :], shape[len(shape) - after :], strict=True)
    elif len(shape) != len(dims):
        return _shape_text(guard, shape)
    else:
        pairs = list(zip(dims, shape, strict=True))
    for dim, size in pairs:
        if dim.number is not None:
            if size_hint(size) != dim.number or not isinstance(size, int):
                return _shape_text(guard, shape)
            continue
        unknown = [n for n in dim.names if n not in sizes]
        known = 1
        for name in dim.names:
            known *= size_hint(sizes[name]) if name in sizes else 1
        if not unknown:
            alone = len(dim.names) == 1
            equal = _same(size, sizes[dim.names[0]]) if alone else size_hint(size) == known
            if not equal:
                return _shape_text(guard, shape, f"{'·'.join(dim.names)} is {known}")
        elif len(unknown) == 1:
            if size_hint(size) % known:
                return _shape_text(guard, shape, f"{size_hint(size)} is no multiple of {known}")
            sizes[unknown[0]] = size if len(dim.names) == 1 else size_hint(size) // known
        else:
            names = ", ".join(f"`{n}`" for n in unknown)
            return f"{guard.name}: the sizes {names} cannot both be told from their product"
    return None


def _same(one: Any, other: Any) -> bool:
    """A dynamic size is only itself, whatever the example's size happens to be."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return str(one) == str(other)


def _shape_text(guard: ShapeGuard, shape: list[Any], why: str = "") -> str:
    wanted = guard.span.text.partition("~")[2].strip()
    found = ", ".join(str(size_hint(s)) if isinstance(s, int) else f"{s}" for s in shape)
    return f"shape({guard.name}) is [{found}], wanted {wanted}" + (f" ({why})" if why else "")


def value_fact(fact: Fact, occurrence: Occurrence, sizes: Mapping[str, Any]) -> Value:
    """A fact of a value, a size or a site that an occurrence binds."""
    name = fact.binding
    if name in occurrence.sites:
        return site_fact(occurrence.sites[name], fact)
    if fact.name == "value" and name in sizes:
        return size_hint(sizes[name])
    value = occurrence.value(name)
    if fact.name == "is":
        return _is_kind(value, str(fact.options["kind"]))
    if fact.name == "value" and isinstance(value, (int, float, bool, str)):
        return value
    tensor = value.tensor if isinstance(value, Op) else None
    if fact.name == "dtype" and tensor is not None:
        return str(tensor.dtype).removeprefix("torch.")
    if fact.name == "dim" and tensor is not None and tensor.ndim:
        return size_hint(tensor.shape[-1])
    fail(
        "G379",
        f"`{name}` has no `{fact.name}` here",
        span=fact.span,
        wanted="a number, for which `is number` asks first" if fact.name == "value" else "a tensor",
        found=_described(value),
        help=f"add `where {name} is number`" if fact.name == "value" else None,
    )


def _described(value: Any) -> str:
    if isinstance(value, Op):
        return f"`{value.node.name}`" + (
            "" if value.tensor is None else f", a tensor {list(value.tensor.shape)}"
        )
    return repr(value)


def _is_circular(occurrence: Occurrence) -> bool:
    """Whether a value from outside depends on a value that the rewrite gives a new one.

    Only possible with two written values or a read one: all others are only used inside.
    """
    pattern = occurrence.pattern
    if not pattern.written:
        return False
    sources = [v for n in pattern.inputs for v in _opened_ops(occurrence.names.get(n))]
    latest = max((s.index for s in sources), default=-1)
    wanted = {s.index for s in sources}
    inside = {v.index for v in occurrence.values}
    stack = [occurrence.values[i] for i in pattern.written]
    seen: set[int] = set()
    while stack:
        op = stack.pop()
        for user in op.users:
            if user.index in wanted:
                return True
            if user.index <= latest and user.index not in seen and user.index not in inside:
                seen.add(user.index)
                stack.append(user)
    return False


def _opened_ops(value: Any) -> list[Op]:
    if isinstance(value, Op):
        return [value]
    if isinstance(value, tuple):
        return [o for v in value for o in _opened_ops(v)]  # pyright: ignore[reportUnknownVariableType]
    return []


def tensor_text(value: Any) -> str:
    """A tensor's shape and dtype, for messages."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size_hint(s)) for s in value.shape)
        return f"[{sizes}] {str(value.dtype).removeprefix('torch.')}"
    return repr(value)
