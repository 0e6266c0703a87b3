"""Python files that a rule names: read only where their user allowed it on the command line.

`bind` comes between `check`, which reads no Python, and the plan. What it gives back has the classes
in its operators' specs, with the arguments that their constructors take.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from graftc.diagnostics import Diagnostic, GraftError, Span, fail, nearest
from graftc.language.rules import (
    Edit,
    Insert,
    Match,
    OneOf,
    OperatorCall,
    Parallel,
    PythonMatch,
    Replace,
    Rule,
    Rules,
)
from graftc.operators.spec import Arg, Kind, OfSite, OperatorSpec, UserClass
from graftc.program.model import Reference
from graftc.rewrite.dataflow.captured import captured

Words = Sequence[str | Path]
"""What was given with `--allow-python`, from the current folder."""

_KINDS: tuple[tuple[type, Kind], ...] = (
    (bool, "bool"), (int, "int"), (float, "float"), (str, "symbol"),
)  # fmt: skip


def bind(rules: Rules, allowed: Words = ()) -> Rules:
    """The rules with every class that they name in a Python file.

    Raises GraftError: G430 for a file that was not allowed, G431 for a path that leaves the folder of
    its `.graft` file, G432 for what is no operator, and what the file itself raises.

    >>> from graftc.language.check import check
    >>> text = 'rule r {\\n match m = mlp\\n replace m with python("ops.py:Mixer")\\n}'
    >>> try:
    ...     bind(check(text))
    ... except GraftError as error:
    ...     print(error.diagnostics[0].help)
    if you trust the file, write `--allow-python ops.py`
    """
    problems: list[Diagnostic] = []
    hashes: dict[str, str] = {}
    for word in allowed:
        if not Path(word).is_file():
            problems.append(
                Diagnostic("G431", f"no such file: {word}", site="--allow-python", found=str(word))
            )
    bound: dict[str, Rule] = {}
    for rule in rules.rules:
        try:
            bound[rule.name] = _bound(rule, allowed, hashes)
        except GraftError as error:
            problems += error.diagnostics
    if problems:
        raise GraftError(*problems)
    unused = [w for w in allowed if str(Path(w).resolve()) not in hashes]
    return replace(
        rules,
        rules=tuple(bound[r.name] for r in rules.rules),
        tests=tuple(replace(t, rule=bound.get(t.rule.name, t.rule)) for t in rules.tests),
        python=hashes,
        notes=(*rules.notes, *map(_unused, unused)),
    )


def _unused(word: str | Path) -> Diagnostic:
    return Diagnostic(
        "G430", f"no rule names `{word}`: it was not read", site="--allow-python", severity="note"
    )


def _bound(rule: Rule, allowed: Words, hashes: dict[str, str]) -> Rule:
    def read(call: OperatorCall) -> OperatorCall:
        user = call.spec.user
        if user is None:
            return call
        found = load(user, call.span, allowed, hashes)
        return _with_class(call, replace(user, found=found))

    matches = tuple(_captured(m, allowed, hashes) for m in rule.matches)
    return replace(rule, edit=with_calls(rule.edit, read), matches=matches)


def _captured(match: Match, allowed: Words, hashes: dict[str, str]) -> Match:
    if not isinstance(match, PythonMatch):
        return match
    function = load(match.user, match.span, allowed, hashes)
    if not inspect.isfunction(function):
        fail("G435", f"`{match.user.written}` is no function", span=match.span,
             found=type(function).__name__)  # fmt: skip
    return captured(function, match)


def with_calls(edit: Edit, change: Callable[[OperatorCall], OperatorCall]) -> Edit:
    """The edit with every operator that it calls changed."""
    match edit:
        case Replace():
            return replace(edit, operator=change(edit.operator))
        case OneOf():
            calls = tuple(None if c is None else change(c) for c in edit.candidates)
            return replace(edit, candidates=calls)
        case Parallel():
            branches = tuple(change(b) if isinstance(b, OperatorCall) else b for b in edit.branches)
            return replace(edit, branches=branches)
        case Insert(new=OperatorCall() as call):
            return replace(edit, new=change(call))
        case _:
            return edit


def load(user: UserClass, span: Span, allowed: Words, hashes: dict[str, str]) -> Any:
    """What `"file.py:name"` names; the file's hash goes to `hashes`. Raises GraftError."""
    file = user.file.resolve()
    _check_allowed(user, file, span, allowed)
    if not file.is_file():
        fail("G431", f"no such file: {user.file}", span=span, found=str(file))
    hashes[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    try:
        return Reference(f"{file}:{user.name}", f"`{file.name}`").resolve()
    except GraftError as error:
        raise GraftError(*(replace(d, span=span) for d in error.diagnostics)) from error


def _check_allowed(user: UserClass, file: Path, span: Span, allowed: Words) -> None:
    """The file is one of the words; where it leaves the folder, a word names the place where it lies."""
    shown = os.path.relpath(user.file)
    named = [w for w in allowed if Path(w).resolve() == file]
    if file.is_relative_to(user.folder.resolve()):
        if not named:
            fail(
                "G430",
                f"this runs code of a Python file, `{user.file.name}`",
                span=span,
                wanted="your word that graftc may run it",
                help=f"if you trust the file, write `--allow-python {shown}`",
            )
        return
    folder = os.path.abspath(user.folder)
    if not any(not Path(os.path.abspath(w)).is_relative_to(folder) for w in named):
        fail(
            "G431",
            f"`{user.written}` leaves the folder of its `.graft` file",
            span=span,
            wanted=f"a file in {folder}",
            found=str(file),
            help=f"copy it there; or name it where it lies: `--allow-python {os.path.relpath(file)}`",
        )


def _with_class(call: OperatorCall, user: UserClass) -> OperatorCall:
    """The call with what the constructor takes. Raises GraftError where the arguments do not fit it."""
    cls = user.found
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        fail(
            "G432",
            f"`{user.name}` of {user.file.name} is no operator",
            span=call.span,
            wanted="a class that is a torch.nn.Module",
            found=type(cls).__name__ if not isinstance(cls, type) else "another class",
        )
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in takes]
    for name, value in call.arguments.items():
        if name not in names and not free:
            near = nearest(name, names)
            fail(
                "G103",
                f"`{user.name}` has no argument `{name}`",
                span=value.span,
                wanted=", ".join(f"`{n}`" for n in names) or "no arguments",
                found=f"`{name}`",
                help=f"write `{near}`" if near else None,
            )
    args = [a for p in takes if (a := _arg(p, p.name in call.arguments)) is not None]
    args += [Arg(n, "any") for n in call.arguments if n not in names]
    return replace(call, spec=replace(call.spec, args=tuple(args), user=user))


def _arg(parameter: inspect.Parameter, given: bool) -> Arg | None:
    """A parameter without a default is the site's own; a default that is no plain value stays Python's."""
    default = parameter.default
    if default is parameter.empty:
        wanted = parameter.annotation
        named: Kind | None = next((k for t, k in _KINDS if wanted in (t, t.__name__)), None)
        return Arg(parameter.name, named or "any", OfSite(parameter.name))
    kind: Kind | None = next((k for t, k in _KINDS if type(default) is t), None)
    if kind is None:
        return Arg(parameter.name, "any") if given else None
    return Arg(parameter.name, kind, default)


def unread(what: OperatorSpec | PythonMatch, span: Span) -> None:
    """Raise for what stands in a file that nobody allowed: a plan was made without `bind`."""
    if what.user is not None and what.user.found is None:
        _check_allowed(what.user, what.user.file.resolve(), span, ())
