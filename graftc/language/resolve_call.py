"""Operator calls: which operator, and whether its arguments fit its spec."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from graftc.diagnostics import Instead, Note, fail, nearest
from graftc.language import syntax as s
from graftc.language.expressions import constant, origin, typed
from graftc.language.resolve_init import source_of
from graftc.language.rules import CopyOf, Expr, Literal_, OperatorCall
from graftc.language.scope import Scope, ToldElsewhereError, listed, suggest
from graftc.language.vocabulary import may_be
from graftc.operators.spec import Arg, Arguments, Cost, OperatorSpec, Part, UserClass


def operator_call(scope: Scope, node: s.Expr, role: str | None) -> OperatorCall:
    """`op(name = value, …)` on a site of `role` (None: not known).

    Raises GraftError with every mistake in its arguments, and ToldElsewhereError where the
    operator itself has mistakes.
    """
    _no_part(scope, node)
    if isinstance(node, s.Path):
        name = node.text
        fail(
            "G120",
            f"`{name}` is called with its arguments",
            span=node.span,
            wanted=f"{name}(…)",
            help=f"write `{name}()`",
        )
    if not isinstance(node, s.Call) or isinstance(node.head, s.Alternatives):
        fail(
            "G120",
            "this is not an operator",
            span=node.span,
            wanted="operator(argument = value, …)",
            found=node.span.text[:40],
        )
    if _is_python(scope, node.head):
        return python_call(scope, node)
    spec = _lookup(scope, node, node.head)
    if role is not None and not any(may_be(role, r) for r in spec.roles):
        fits = tuple(
            n for n, other in scope.operators.items() if any(may_be(role, r) for r in other.roles)
        )
        fail(
            "G124",
            f"`{spec.name}` cannot replace {'an' if role[0] in 'aeiou' else 'a'} {role}",
            span=node.head.span,
            wanted=f"a site of role {listed(spec.roles)}",
            found=role,
            help=f"operators for {role}: {listed(fits)}" if fits else None,
        )
    spec = spec.for_role(role) if role is not None else spec
    return OperatorCall(spec, arguments_of(scope, node, spec), node.span)


def _no_part(scope: Scope, node: s.Expr) -> None:
    """Raise GraftError for `b.copy()`: what is bound has no operators of its own."""
    head = node.head if isinstance(node, s.Call) else node
    if not isinstance(head, s.Path) or len(head.names) < 2:
        return
    bound, last = head.names[0].text, head.names[-1].text
    if bound in scope.bindings:
        fail(
            "G102",
            f"`{head.text}` is no operator: `{bound}` is what `match` binds",
            span=node.span,
            wanted="an operator's own name, or copy(BLOCK)",
            found=f"`{head.text}`",
            help=Instead(f"copy({bound})") if last in _COPIES else None,
        )


_COPIES = ("copy", "clone", "duplicate")
"""What people call a block's copy, which is `copy`."""


def _lookup(scope: Scope, node: s.Call, head: s.Path) -> OperatorSpec:
    name = head.text
    if name in scope.operators:
        if name in scope.defined:
            fail(
                "G118",
                f"`{name}` is an operator of this file and one of graftc's own",
                span=head.span,
                notes=[Note("this file defines it here", scope.defined[name].item.name.span)],
                help="give the one of this file another name",
            )
        return scope.operators[name]
    if name in scope.defined:
        spec = scope.defined[name].spec
        if spec is not None:
            return spec
        raise ToldElsewhereError
    known = (*scope.operators, *scope.defined, "parallel")
    qualified = next((n for n in scope.defined if n.partition(".")[2] == name), None)
    near = "copy" if name in _COPIES else qualified or nearest(name, known)
    fail(
        "G102",
        f"unknown operator `{name}`",
        span=head.span,
        wanted=listed((*scope.operators, *scope.defined), 30),
        found=f"`{name}`",
        help=Instead(near)
        if near
        else f"define it: `operator {name}(…)`, or bring it in with `use`",
    )


def _is_python(scope: Scope, head: s.Path) -> bool:
    return head.text == "python" and not {"python"} & {*scope.operators, *scope.defined}


def python_call(scope: Scope, node: s.Call) -> OperatorCall:
    """`python("ops.py:Mixer", kernel = 4)`; what it takes is known once the file may be imported."""
    first = node.positional[0] if len(node.positional) == 1 else None
    if not isinstance(first, s.Text):
        fail(
            "G120",
            "`python` takes a file and a class, then arguments by name",
            span=node.span,
            wanted='python("file.py:Class", argument = value, …)',
            found=node.span.text[:60],
        )
    user = user_class(first)
    given: dict[str, Expr] = {}
    for argument in node.named:
        with scope.log.attempt():
            if argument.name.text in given:
                name = argument.name
                fail("G119", f"`{name.text}` is given twice", span=name.span, help="give it once")
            given[argument.name.text] = typed(scope, argument.value, "any")
    return OperatorCall(unread(user), given, node.span)


def user_class(text: s.Text) -> UserClass:
    """The file and the name in `"file.py:Class"`, from the folder of the `.graft` file. Raises GraftError."""
    file, _, name = text.value.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier() or "\0" in file or "\\" in file:
        fail(
            "G120",
            "this is no name in a Python file",
            span=text.span,
            wanted='"file.py:name", the path from the folder of this file',
            found=text.span.text[:60],
        )
    folder = Path(text.span.source.name).parent
    return UserClass(text.value, folder / file, folder, name)


def unread(user: UserClass) -> OperatorSpec:
    """The spec of a class of a file that was not read: only where it stands is known."""
    roles = ("self_attention", "mlp", "norm", "linear")
    return OperatorSpec(
        name=user.name,
        module="",
        summary=f"`{user.name}` of {user.file.name}",
        roles=roles,
        mixes="tokens",
        args=(),
        slots=(),
        inits={},
        cost=_no_cost,
        source=user.written,
        user=user,
    )


def _no_cost(arguments: Arguments, tokens: int) -> Cost:
    raise AssertionError("the cost of an operator that was not read")


def arguments_of(
    scope: Scope, node: s.Call, spec: OperatorSpec, given: tuple[str, ...] = ()
) -> dict[str, Expr]:
    """The named arguments, checked against the spec; `given` are filled in by graftc.

    Mistakes go to the scope's log, so that each is reported.
    """
    takes = {a.name: a for a in spec.args if a.name not in given}
    for value in node.positional:
        with scope.log.attempt():
            first = next(iter(takes), None)
            fail(
                "G126",
                f"`{spec.name}` takes its arguments by name",
                span=value.span,
                wanted=listed(takes, 30) or "no arguments",
                help=f"write `{first} = {value.span.text[:40]}`" if first else "leave it out",
            )
    found: dict[str, Expr] = {}
    for argument in node.named:
        with scope.log.attempt():
            name = argument.name
            arg = takes.get(name.text)
            if arg is None:
                _no_argument(name, spec, takes)
            if name.text in found:
                fail("G119", f"`{name.text}` is given twice", span=name.span, help="give it once")
            found[name.text] = _value(scope, spec, arg, argument.value)
    missing = [
        a for a in takes.values() if a.required and a.name not in {n.name.text for n in node.named}
    ]
    for arg in missing:
        with scope.log.attempt():
            fail(
                "G123",
                f"`{spec.name}` needs `{arg.name}`",
                span=node.head.span,
                wanted=f"{arg.name}: {arg.doc}" if arg.doc else arg.name,
                help=f"write `{spec.name}({arg.name} = …)`",
            )
    return found


def _no_argument(name: s.Name, spec: OperatorSpec, takes: dict[str, Arg]) -> NoReturn:
    slot = spec.slot(name.text)
    fail(
        "G103",
        f"`{spec.name}` has no argument `{name.text}`",
        span=name.span,
        wanted=listed(takes, 30) or "no arguments",
        found=f"`{name.text}`",
        notes=[Note(f"`{name.text}` is a slot: fill it in `init`")] if slot else (),
        help=suggest(name.text, takes),
    )


def _value(scope: Scope, spec: OperatorSpec, arg: Arg, node: s.Expr) -> Expr:
    if arg.kind == "groups":
        return _groups(arg, node)
    value = typed(scope, node, arg.kind)
    if not isinstance(value, Literal_):
        return value
    if arg.choices and value.value not in arg.choices:
        fail(
            "G121",
            f"`{arg.name}` of `{spec.name}` cannot be `{value.value}`",
            span=node.span,
            wanted=listed(arg.choices),
            found=f"`{value.value}`",
            help=suggest(str(value.value), arg.choices),
        )
    if isinstance(value.value, (int, float)) and not isinstance(value.value, bool):
        if arg.minimum is not None and value.value < arg.minimum:
            _too_small(scope, spec, arg, node, f"{arg.minimum:g} or more", f"{arg.minimum:g}")
        if arg.above is not None and value.value <= arg.above:
            _too_small(scope, spec, arg, node, f"more than {arg.above:g}", None)
    return value


def _groups(arg: Arg, node: s.Expr) -> Expr:
    """`{text: full, image: local}` as the text that the operator takes."""
    items = node.items if isinstance(node, s.Braces) else ()
    pairs = [(i.key.text, i.value.text) for i in items
             if isinstance(i, s.Pair) and isinstance(i.value, s.Path)]  # fmt: skip
    if not pairs or len(pairs) != len(items) or len(dict(pairs)) != len(pairs):
        fail(
            "G120",
            f"`{arg.name}` says for each stream what it sees",
            span=node.span,
            wanted="{NAME: full, NAME: local}, each stream once",
            found=node.span.text[:60],
        )
    for item in items:
        if isinstance(item, s.Pair) and item.value.span.text not in ("full", "local"):
            fail(
                "G121",
                f"a stream cannot be `{item.value.span.text}`",
                span=item.value.span,
                wanted="`full` or `local`",
                help=suggest(item.value.span.text, ("full", "local")),
            )
    return Literal_(", ".join(f"{k}: {v}" for k, v in pairs), node.span)


def _too_small(
    scope: Scope, spec: OperatorSpec, arg: Arg, node: s.Expr, wanted: str, least: str | None
) -> None:
    fail(
        "G122",
        f"`{arg.name}` of `{spec.name}` is too small",
        span=node.span,
        wanted=wanted,
        found=node.span.text,
        notes=origin(scope, node),
        help=f"write `{arg.name} = {least}`" if least else None,
    )


def copy_of(scope: Scope, node: s.Call) -> CopyOf:
    """`copy(b)`, `copy(b, zero = {b.attention.out})`. Raises GraftError."""
    first = node.positional[0] if len(node.positional) == 1 else None
    if not isinstance(first, s.Path) or len(first.names) != 1:
        fail("G126", "`copy` takes one bound block", span=node.span, wanted="copy(b)")
    binding = scope.binding(first.names[0])
    if binding.role not in (None, "block"):
        fail(
            "G124",
            "`copy` takes a block",
            span=first.span,
            wanted="a name bound to a block",
            found=binding.role,
            notes=[Note("it is bound here", binding.span)],
        )
    zero: list[Part] = []
    for option in node.named:
        if option.name.text != "zero":
            fail(
                "G103",
                f"`copy` has no option `{option.name.text}`",
                span=option.name.span,
                wanted="`zero`",
                help=suggest(option.name.text, ("zero",)),
            )
        items = option.value.items if isinstance(option.value, s.Braces) else (option.value,)
        zero += [_zeroed(scope, item, binding.name) for item in items]
    return CopyOf(binding.name, node.span, tuple(zero))


def _zeroed(scope: Scope, item: s.Expr | s.RangeItem | s.Pair, block: str) -> Part:
    """`b.attention.out`: a part of the block that is copied."""
    source = source_of(scope, item) if isinstance(item, s.Path) else None
    if (
        not isinstance(source, Part)
        or source.name is None
        or not isinstance(item, s.Path)
        or len(item.names) != 3
    ):
        fail(
            "G120",
            "`zero` takes parts",
            span=item.span,
            wanted=f"zero = {{{block}.attention.out, {block}.mlp.down}}",
            found=item.span.text,
        )
    if item.names[0].text != block:
        fail(
            "G120",
            f"`{item.text}` is no part of the block that is copied",
            span=item.span,
            wanted=f"a part of `{block}`",
            found=f"a part of `{item.names[0].text}`",
        )
    return source


def check_constant_options(scope: Scope, node: s.Call, spec: OperatorSpec) -> dict[str, Expr]:
    """A merge's own arguments (`lerp(start = 0.5)`), which are constants."""
    for argument in node.named:
        if spec.arg(argument.name.text) is not None:
            with scope.log.attempt():
                constant(scope, argument.value, "any")
    return arguments_of(scope, node, spec, ("dim", "branches"))
