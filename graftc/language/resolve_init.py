"""`init`: which slot gets its first weights from which source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from graftc.diagnostics import Instead, Note, fail, nearest
from graftc.language import syntax as s
from graftc.language.expressions import constant, typed
from graftc.language.rules import Computed, Init, Literal_
from graftc.language.scope import Scope, already, listed, suggest
from graftc.language.vocabulary import ALL_PARTS, BLOCK_PARTS, PARTS, POLICIES, Policy, Type, covers
from graftc.operators.spec import Apply, Const, InitSource, OperatorSpec, Part, Slot


def inits_of(
    scope: Scope, items: Sequence[s.InitItem], spec: OperatorSpec | None
) -> tuple[Init, ...]:
    """The init clause of a rule whose new operator is `spec` (None: not known yet).

    Mistakes go to the scope's log.
    """
    found: list[Init] = []
    for item in items:
        with scope.log.attempt():
            if item.slot is None:
                _check_whole(scope, item.source)
            source = source_of(scope, item.source)
            if item.slot is not None and spec is not None:
                _check_slot(item.slot, spec)
            found.append(Init(item.slot.text if item.slot else None, source, item.span))
    for at, init in enumerate(found):
        for first in found[:at]:
            if _overlap(init.slot, first.slot, spec):
                what = f"`{init.slot}`" if init.slot else "the whole operator"
                message = f"{what} gets its weights twice"
                scope.log.add(already("G129", message, init.span, first.span, "leave one out"))
                break
    return tuple(found)


def _check_slot(name: s.Name, spec: OperatorSpec) -> None:
    if spec.slot(name.text) is not None:
        return
    names = tuple(x.name for x in spec.slots)
    notes = [Note(f"`{name.text}` is an argument: write `{spec.name}({name.text} = …)`")]
    fail(
        "G107",
        f"`{spec.name}` has no slot `{name.text}`",
        span=name.span,
        wanted=listed(names, 30) or "no slot: it has no parameters",
        found=f"`{name.text}`",
        notes=notes if spec.arg(name.text) else (),
        help=suggest(name.text, names) or (f"write `{names[0]}`" if len(names) == 1 else None),
    )


def _overlap(one: str | None, other: str | None, spec: OperatorSpec | None) -> bool:
    if one is None or other is None:
        return one is other
    if one == other:
        return True
    a, b = (spec.slot(one), spec.slot(other)) if spec else (None, None)
    return a is not None and b is not None and _same_weights(a, b)


def _same_weights(a: Slot, b: Slot) -> bool:
    if a.module != b.module or (a.parameter and b.parameter and a.parameter != b.parameter):
        return False
    return a.rows is None or b.rows is None or a.rows[0] == b.rows[0]


def _check_whole(scope: Scope, node: s.Expr) -> None:
    """A source without a slot must be one that fills a whole operator."""
    head = node.head if isinstance(node, s.Call) else node
    name = head.text if isinstance(head, s.Path) else None
    if name is not None and (name not in POLICIES or POLICIES[name].whole):
        return  # a bound site as it is; or unknown, and source_of says so
    if isinstance(head, s.Path) and head.names[0].text in scope.bindings and len(head.names) == 1:
        return
    whole = tuple(n for n, p in POLICIES.items() if p.whole)
    fail(
        "G107",
        "this source fills one slot: which?",
        span=node.span,
        wanted=f"slot = source, or a source for the whole operator ({listed(whole)})",
        found=node.span.text,
        help=f"write `SLOT = {node.span.text}`",
    )


def source_of(scope: Scope, node: s.Expr) -> InitSource:
    """A source of weights. Raises GraftError."""
    match node:
        case s.Path(names=(name,)) if (
            name.text not in scope.bindings and name.text not in scope.settings
        ):
            return _call(scope, name.text, name, (), ())
        case s.Path(names=(name,)) if name.text in scope.bindings:
            scope.binding(name)
            return Part(name.text)
        case s.Path() if len(node.names) > 1:
            return part_of(scope, node)
        case s.Call(head=s.Path(names=(name,))):
            return _call(scope, name.text, name, node.positional, node.named)
        case _:
            fail(
                "G120",
                "this is not a source of weights",
                span=node.span,
                wanted="a part such as `a.q`, or a source such as `zero`",
                found=node.span.text,
            )


def part_of(scope: Scope, node: s.Path) -> Part:
    """`a.q`, `b.attention.out`: the site and the part. Raises GraftError."""
    binding = scope.binding(node.names[0])
    *inner, last = node.names[1:]
    role = binding.role
    for name in inner:
        if name.text not in BLOCK_PARTS or (role is not None and role != "block"):
            fail(
                "G109",
                f"`{binding.name}` has no site `{name.text}` inside",
                span=name.span,
                wanted=listed(BLOCK_PARTS) + " of a block",
                help=suggest(name.text, BLOCK_PARTS),
            )
        role = name.text
    parts = ALL_PARTS if role is None else PARTS.get(role, ())
    if role == "block":
        parts = BLOCK_PARTS
    if last.text not in parts:
        where = {
            r for r, names in PARTS.items() if last.text in names and not covers("attention", r)
        }
        fail(
            "G109",
            f"`{'.'.join(n.text for n in node.names[:-1])}` has no part `{last.text}`",
            span=last.span,
            wanted=listed(parts) or f"`{binding.name}` itself: {_an(role)} has no parts",
            found=f"`{last.text}`"
            + (f", a part of {_an(next(iter(where)))}" if where and role else ""),
            notes=[
                Note(
                    f"`{binding.name}` is bound here" + (f" to {role}" if role else ""),
                    binding.span,
                )
            ],
            help=suggest(last.text, parts),
        )
    return Part(".".join(n.text for n in node.names[:-1]), last.text)


def _an(role: str | None) -> str:
    return f"{'an' if (role or 's')[0] in 'aeiou' else 'a'} {role or 'site'}"


def _call(
    scope: Scope,
    policy: str,
    name: s.Name,
    positional: tuple[s.Expr, ...],
    named: tuple[s.Named, ...],
) -> Apply:
    known = POLICIES.get(policy)
    if known is None:
        _unknown_policy(scope, name)
    options: dict[str, InitSource] = {}
    if known.number is not None:
        if len(positional) > 1 or (
            not positional and not any(n.name.text == known.number for n in named)
        ):
            fail(
                "G123",
                f"`{policy}` takes its {known.number}",
                span=name.span,
                wanted=f"{policy}({known.number})",
                help=f"write `{policy}(0)`",
            )
        if positional:
            options[known.number] = Const(constant(scope, positional[0], "int"))
        positional = ()
    most = known.most
    if len(positional) < known.least or (most is not None and len(positional) > most):
        many = f"{known.least}" if known.least == most else f"{known.least} or more"
        fail(
            "G126",
            f"`{policy}` takes {many} source{'' if many == '1' else 's'}",
            span=name.span,
            wanted=f"{known.doc}",
            found=f"{len(positional)}",
            help=f"write `{policy}`" if most == 0 else None,
        )
    args = tuple(source_of(scope, a) for a in positional)
    for option in named:
        _option(scope, policy, known, option, options)
    for required in known.required:
        if required not in options:
            fail(
                "G123",
                f"`{policy}` needs `{required}`",
                span=name.span,
                wanted=f"{required} = …",
                help=f"write `{policy}(…, {required} = 4)`",
            )
    return Apply(policy, args, options)


def _option(
    scope: Scope, policy: str, known: Policy, option: s.Named, options: dict[str, InitSource]
) -> None:
    kinds: dict[str, tuple[Type, tuple[str, ...]]] = {
        **(known.options or {}),
        **({known.number: ("int", ())} if known.number else {}),
    }
    name = option.name
    if name.text not in kinds:
        fail(
            "G103",
            f"`{policy}` has no option `{name.text}`",
            span=name.span,
            wanted=listed(kinds) or "no options",
            help=suggest(name.text, kinds),
        )
    if name.text in options:
        fail("G119", f"`{name.text}` is given twice", span=name.span, help="give it once")
    kind, choices = kinds[name.text]
    value = typed(scope, option.value, kind)
    if not isinstance(value, Literal_):
        options[name.text] = Computed(None, value)
        return
    if choices and value.value not in choices:
        fail(
            "G121",
            f"`{name.text}` cannot be `{value.value}`",
            span=option.value.span,
            wanted=listed(choices),
            help=suggest(str(value.value), choices),
        )
    if kind == "int" and isinstance(value.value, int) and value.value < 0:
        fail(
            "G122", f"`{name.text}` cannot be negative", span=option.value.span, wanted="0 or more"
        )
    options[name.text] = Const(value.value)


def _unknown_policy(scope: Scope, name: s.Name) -> NoReturn:
    candidates: Mapping[str, object] = {**POLICIES, **scope.bindings}
    near = nearest(name.text, candidates)
    fail(
        "G108",
        f"unknown source of weights `{name.text}`",
        span=name.span,
        wanted=f"a part such as `a.q`, or {listed(POLICIES, 30)}",
        found=f"`{name.text}`",
        help=Instead(near) if near else None,
    )
