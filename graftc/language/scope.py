"""What the resolver carries along: the names in scope, and the mistakes found so far."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from graftc.diagnostics import Diagnostic, GraftError, Instead, Note, Span, fail, nearest
from graftc.language import syntax as s
from graftc.operators.spec import OperatorSpec


class ToldElsewhereError(GraftError):
    """What is named here has mistakes, which are told where it is defined; there is nothing to add."""


@dataclass
class Log:
    """Collects mistakes, so that one does not hide the next."""

    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Runs the body; a GraftError in it is kept, and the rest of the file goes on."""
        try:
            yield
        except GraftError as error:
            self.diagnostics += error.diagnostics

    @property
    def errors(self) -> list[Diagnostic]:
        return [d for d in self.diagnostics if d.severity == "error"]

    def add(self, diagnostic: Diagnostic) -> None:
        self.diagnostics.append(diagnostic)


@dataclass
class Setting:
    """A `set` parameter. `overridden` says by whom, where another value won."""

    name: str
    value: s.SetValue
    span: Span
    used: bool = False
    overridden: str = ""


@dataclass
class Binding:
    """A name of a `match` clause. `role` None: by path or class, so anything.

    `site` False: a value of a dataflow pattern; `made`: by an op of the pattern.
    """

    name: str
    span: Span
    role: str | None = None
    used: bool = False
    site: bool = True
    made: bool = False


@dataclass(frozen=True)
class DefinedOperator:
    """An `operator` of a `.graft` file; `module` is the file's short name, for `std.name`.

    `spec` None: the operator has mistakes, which are told where it stands.
    """

    item: s.OperatorItem
    module: str
    spec: OperatorSpec | None = None


@dataclass
class Scope:
    """The names that a file's rules see; `bindings` are those of the rule at hand."""

    operators: Mapping[str, OperatorSpec]
    merges: Mapping[str, OperatorSpec]
    log: Log
    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    defined: dict[str, DefinedOperator] = field(default_factory=dict[str, DefinedOperator])
    bindings: dict[str, Binding] = field(default_factory=dict[str, Binding])

    def for_rule(self) -> Scope:
        """The same scope with no bindings."""
        return replace(self, bindings={})

    def setting(self, name: str) -> Setting | None:
        """The parameter of this name, marked as used."""
        found = self.settings.get(name)
        if found is not None:
            found.used = True
        return found

    def binding(self, name: s.Name) -> Binding:
        """The binding of this name, marked as used. Raises GraftError where nothing binds it."""
        found = self.bindings.get(name.text)
        if found is None:
            near = nearest(name.text, self.bindings)
            names = ", ".join(f"`{b}`" for b in self.bindings) or "nothing"
            fail(
                "G105",
                f"`{name.text}` is not bound",
                span=name.span,
                wanted=f"a name that `match` binds: {names}",
                found=f"`{name.text}`",
                help=Instead(near or next(iter(self.bindings)))
                if self.bindings
                else f"add `match {name.text} = …`",
            )
        found.used = True
        return found


def suggest(name: str, candidates: Mapping[str, object] | tuple[str, ...]) -> Instead | None:
    """Advice to write the nearest candidate instead."""
    near = nearest(name, candidates)
    return Instead(near) if near else None


def listed(names: Mapping[str, object] | tuple[str, ...], most: int = 14) -> str:
    """Names for a `wanted` line.

    >>> listed(("l1", "l2"))
    '`l1`, `l2`'
    """
    shown = [f"`{n}`" for n in names]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")


def already(code: str, message: str, span: Span, first: Span, help: str) -> Diagnostic:
    """A diagnostic for the second of two things where one may be."""
    return Diagnostic(
        code, message, span=span, notes=(Note("the first is here", first),), help=help
    )
