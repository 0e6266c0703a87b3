"""Classes that are copied into the file as they are: graftc's operators, and a user's own."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from graftc.diagnostics import fail

# Names that the file itself brings.
_GIVEN = {"torch", "nn", "F", "Tensor", "math"}


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
        text = _source(thing, name)
        module = inspect.getmodule(thing)
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
        for old, new in renamed.items():
            if old != new:
                text = _with_name(text, old, new)
        renamed[name] = self._place(name, text, taken, inspect.isclass(thing))

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
        import sys

        if module.split(".")[0] not in ({"torch"} | set(sys.stdlib_module_names)):
            fail(
                "G603", f"the source of `{user}` needs `{module}`", site=user,
                wanted="an operator that imports torch and the standard library alone",
                help="move what it uses into its own file",
            )  # fmt: skip


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


def _source(thing: Any, name: str) -> str:
    try:
        return textwrap.dedent(inspect.getsource(thing)).rstrip()
    except (OSError, TypeError):
        fail("G603", f"no source of `{name}` is to be found", site=name,
             help="define the operator in a file, not in an interactive session")  # fmt: skip


def _free_names(text: str) -> list[str]:
    """Names that a piece of source reads, in order of appearance, annotations left out."""
    tree = ast.parse(text)
    skip: set[int] = set()
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                skip |= {id(n) for n in ast.walk(annotation)}
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) not in skip and isinstance(node.ctx, ast.Load):
            found[node.id] = None
    return list(found)
