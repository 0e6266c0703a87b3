"""The names of a Python function, read from its text: nothing is imported, and no code of it runs."""

from __future__ import annotations

import ast
from pathlib import Path

from graftc.diagnostics import fail, nearest
from graftc.language import syntax as s
from graftc.language.resolve_call import user_class
from graftc.language.rules import PythonMatch
from graftc.language.scope import Binding, Scope, already


def python_match(scope: Scope, clause: s.MatchPython) -> PythonMatch:
    """`match python("f.py:g")`: its parameters come from outside, what it returns is made by the pattern.

    Raises GraftError: G431 for a file that is not there or leaves the folder, G435 for a function that is
    not in it or has parameters that no pattern can bind.
    """
    text = clause.function
    user = user_class(text)
    if not user.file.resolve().is_relative_to(user.folder.resolve()):
        fail("G431", f"`{user.written}` leaves the folder of its `.graft` file", span=text.span,
             wanted=f"a file in {user.folder.absolute()}", found=str(user.file.resolve()),
             help="copy the file there")  # fmt: skip
    if not user.file.is_file():
        fail("G431", f"no such file: {user.file}", span=text.span,
             help="a pattern's names are those of the function, which is read from its text")  # fmt: skip
    function = _function(user.file, user.name, text)
    inputs = _parameters(function, text)
    outputs = _returned(function)
    for name, made in (*((i, False) for i in inputs), *((o, True) for o in outputs)):
        first = scope.bindings.get(name)
        if first is not None:
            message = f"`{name}` of {user.written} is bound already"
            scope.log.add(
                already("G113", message, text.span, first.span, "give it another name there")
            )
        scope.bindings[name] = Binding(name, text.span, None, True, False, made)
    return PythonMatch(user, inputs, outputs, clause.span)


def _function(file: Path, name: str, text: s.Text) -> ast.FunctionDef:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        fail("G435", f"{file.name} cannot be read: {error}", span=text.span)
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    if name not in functions:
        near = nearest(name, functions)
        fail("G435", f"{file.name} has no function `{name}`", span=text.span,
             wanted=", ".join(f"`{f}`" for f in functions) or "a function",
             help=f"write `{near}`" if near else None)  # fmt: skip
    return functions[name]


def _parameters(function: ast.FunctionDef, text: s.Text) -> tuple[str, ...]:
    """Those without a default, which stays what it is."""
    given = function.args
    if given.vararg or given.kwarg:
        fail("G435", f"`{function.name}` takes any number of arguments, which no pattern binds",
             span=text.span, wanted="parameters by name")  # fmt: skip
    plain = [*given.posonlyargs, *given.args]
    named = [p for p, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is None]
    count = len(plain) - len(given.defaults)
    return tuple(p.arg for p in (*plain[:count], *named))


def _returned(function: ast.FunctionDef) -> tuple[str, ...]:
    """`return p, o` returns `p` and `o`; what has no name there has the function's."""
    last = next((x for x in reversed(function.body) if isinstance(x, ast.Return)), None)
    value = last.value if last else None
    items = value.elts if isinstance(value, ast.Tuple) else [value]
    names = [i.id for i in items if isinstance(i, ast.Name)]
    if len(names) == len(items) and len(set(names)) == len(names):
        return tuple(names)
    if len(items) == 1:
        return (function.name,)
    return tuple(f"{function.name}_{i}" for i in range(len(items)))
