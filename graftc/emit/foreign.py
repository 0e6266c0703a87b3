"""Classes that are copied into the file as they are: graftc's operators, and a user's own."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from graftc.diagnostics import fail

# Names that the file itself brings.
_GIVEN = {"torch", "nn", "F", "Tensor", "math"}
_GIVEN_IN_ANNOTATIONS = {"Any", "Path"}


@dataclass
class Foreign:
    """Sources in the order in which they are printed, and the name each class has in the file."""

    sources: dict[str, str] = field(default_factory=dict[str, str])
    _names: dict[type, str] = field(default_factory=dict[type, str])
    imports: set[str] = field(default_factory=set[str])

    def name(self, cls: type) -> str:
        return self._names[cls]

    def add(self, cls: type, taken: set[str]) -> None:
        """Copy a class with what its source refers to in its own file. Raises GraftError without source."""
        if cls in self._names:
            return
        renamed: dict[str, str] = {}
        self._copy(cls.__name__, cls, taken, renamed)
        self._names[cls] = renamed[cls.__name__]

    def _copy(self, name: str, thing: Any, taken: set[str], renamed: dict[str, str]) -> None:
        module = inspect.getmodule(thing)
        text = _source(thing, name, module)
        renamed[name] = name
        for inner in _free_names(text):
            if inner in renamed or inner == name or inner in _GIVEN:
                continue
            value = getattr(module, inner, None)
            if value is None:
                continue
            if inspect.ismodule(value):
                self._import(inner, value, name)
            elif _is_own(value, module):
                self._copy(inner, value, taken, renamed)
            elif isinstance(value, (int, float, str, bool, tuple)) and not inner.startswith("__"):
                renamed[inner] = self._place(inner, f"{inner} = {value!r}", taken, False)
            else:
                self._import_from(inner, value, name)
        for inner in _annotation_names(text):
            if inner not in renamed and inner not in _GIVEN | _GIVEN_IN_ANNOTATIONS:
                self._annotate(inner, module, taken, renamed)
        for old, new in renamed.items():
            if old != new:
                text = _with_name(text, old, new)
        renamed[name] = self._place(name, text, taken, inspect.isclass(thing))

    def _annotate(self, name: str, module: Any, taken: set[str], renamed: dict[str, str]) -> None:
        """Bring what annotations alone name, if it is an import or an alias of torch's types.

        Nothing reads them when the file runs: what would need more is left as it stands.
        """
        value = getattr(module, name, None)
        if inspect.ismodule(value):
            if _is_allowed(value.__name__):
                self._import(name, value, name)
            return
        home = str(getattr(value, "__module__", ""))
        if _is_allowed(home) and getattr(sys.modules.get(home), name, None) is value:
            self._import_from(name, value, name)
            return
        alias = _assignment(module, name)
        if alias is not None and set(_free_names(alias)) <= _GIVEN | set(dir(builtins)):
            renamed[name] = self._place(name, alias, taken, False)

    def _place(self, name: str, text: str, taken: set[str], is_class: bool) -> str:
        """Put a source into the file, under another name if its own is taken by something else."""
        new = name
        while new in taken:
            if self.sources.get(new) == _with_name(text, name, new):
                return new
            new = f"Grafted{new}" if is_class else f"{new}_"
        taken.add(new)
        self.sources[new] = _with_name(text, name, new)
        return new

    def _import(self, name: str, module: Any, user: str) -> None:
        self._allowed(module.__name__, user)
        full = module.__name__
        self.imports.add(f"import {full}" if full == name else f"import {full} as {name}")

    def _import_from(self, name: str, value: Any, user: str) -> None:
        module = str(getattr(value, "__module__", ""))
        self._allowed(module, user)
        self.imports.add(f"from {module} import {name}")

    def _allowed(self, module: str, user: str) -> None:
        if not _is_allowed(module):
            fail(
                "G603", f"the source of `{user}` needs `{module}`", site=user,
                wanted="an operator that imports torch and the standard library alone",
                help="move what it uses into its own file",
            )  # fmt: skip


def _is_allowed(module: str) -> bool:
    return module.split(".")[0] in ({"torch"} | set(sys.stdlib_module_names))


def _is_own(value: Any, module: Any) -> bool:
    """Whether a value's source is copied with its user's: of the same file, or of graftc's operators."""
    source = str(getattr(value, "__module__", None))
    return source == getattr(module, "__name__", "") or source.startswith("graftc.operators.")


def _with_name(text: str, old: str, new: str) -> str:
    """`text` with a file-level name changed; attributes and keyword arguments are other names."""
    if old == new:
        return text
    head = re.sub(rf"^{re.escape(old)} = ", f"{new} = ", text)
    return re.sub(rf"(?<![\w.]){re.escape(old)}\b(?!\s*=[^=])", new, head)


def _source(thing: Any, name: str, module: Any) -> str:
    """What defines `name`: the source of a class or function, or, of another value, the assignment in its file."""
    try:
        text = textwrap.dedent(inspect.getsource(thing)).rstrip()
        if name in _defined(ast.parse(text).body[0]):
            return text
    except (OSError, TypeError):
        fail("G603", f"no source of `{name}` is to be found", site=name,
             help="define the operator in a file, not in an interactive session")  # fmt: skip
    if (assigned := _assignment(module, name)) is not None:
        return assigned
    fail("G603", f"no source of `{name}` is to be found", site=name,
         wanted="a class, a function or an assignment at the level of its file",
         help=f"define `{name}` by `def` or `class`")  # fmt: skip


def _assignment(module: Any, name: str) -> str | None:
    """The statement that gives `name` its value at the level of a file."""
    try:
        whole = inspect.getsource(module)
    except (OSError, TypeError):
        return None
    for statement in ast.parse(whole).body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and name in _defined(statement):
            return ast.get_source_segment(whole, statement)
    return None


def _defined(statement: ast.stmt) -> set[str]:
    """The names that a statement of a file gives a value."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {t.id for t in statement.targets if isinstance(t, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return set()


def _free_names(text: str) -> list[str]:
    """Names that a piece of source reads, in order of appearance, annotations left out."""
    tree = ast.parse(text)
    skip = {id(n) for n in _annotations(tree)}
    return list(dict.fromkeys(n.id for n in _reads(ast.walk(tree)) if id(n) not in skip))


def _annotation_names(text: str) -> list[str]:
    """Names that the annotations of a piece of source read."""
    return list(dict.fromkeys(n.id for n in _reads(_annotations(ast.parse(text)))))


def _reads(nodes: Iterable[ast.AST]) -> Iterable[ast.Name]:
    return (n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))


def _annotations(tree: ast.AST) -> Iterable[ast.AST]:
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                yield from ast.walk(annotation)
