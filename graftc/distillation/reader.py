"""Reads checked values out of plain data (a YAML table), naming the place of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from graftc.diagnostics import fail, nearest

_REQUIRED: Any = object()


class Table:
    """One mapping of a file and where it stands. A key that nobody asked for is an error.

    >>> table = Table({"steps": 3}, "targets.yaml")
    >>> table.count("steps"), table.done()
    (3, None)
    """

    def __init__(self, data: Any, where: str) -> None:
        self.where = where
        self._asked: list[str] = []
        if not isinstance(data, Mapping):
            fail("G502", "a table is expected here", site=where,
                 wanted="key: value", found=type(data).__name__)  # fmt: skip
        self._data = cast(Mapping[str, Any], data)

    def at(self, name: str) -> str:
        """The place of an entry, as a diagnostic shows it: `targets.yaml: sites.0.loss`."""
        return f"{self.where}.{name}" if ": " in self.where else f"{self.where}: {name}"

    def wrong(self, name: str, message: str) -> NoReturn:
        """Raise the diagnostic for this entry."""
        fail("G502", message, site=self.at(name))

    def done(self) -> None:
        """Refuse keys that were not asked for: a misspelt key must not pass in silence."""
        for name in self._data:
            if name not in self._asked:
                near = nearest(str(name), self._asked)
                fail("G502", f"unknown key `{name}`", site=self.at(str(name)),
                     wanted=", ".join(self._asked),
                     help=f"write `{near}`" if near else None)  # fmt: skip

    def has(self, name: str) -> bool:
        """Whether the key is there with a value."""
        self._asked.append(name)
        return self._data.get(name) is not None

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands; null counts as absent."""
        if self.has(name):
            return self._data[name]
        if default is _REQUIRED:
            self.wrong(name, f"`{name}` is missing")
        return default

    def _typed(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.take(name, default)
        if value is default or (isinstance(value, kinds) and not _is_stray_bool(value, kinds)):
            return value
        fail("G502", f"`{name}` is not {what}", site=self.at(name), wanted=what, found=repr(value))

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        return self._typed(name, (str,), "text", default)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        return self._typed(name, (bool,), "true or false", default)

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        value = self._typed(name, (int,), "a whole number", default)
        if value < 0:
            self.wrong(name, f"`{name}` is negative: {value}")
        return value

    def argument(self, name: str) -> int | str:
        """A position (0, 1, …) or a keyword."""
        value = self._typed(name, (int, str), "a position or a keyword", _REQUIRED)
        if isinstance(value, int) and value < 0:
            self.wrong(name, f"`{name}` is negative: {value}")
        return value

    def count(self, name: str, least: int = 1) -> int | None:
        """A whole number from `least` up, or None."""
        value = self._typed(name, (int,), "a whole number", None)
        if value is not None and value < least:
            self.wrong(name, f"`{name}` must be at least {least}, not {value}")
        return value

    def optional_positive(self, name: str) -> float | None:
        """A number above 0, or None."""
        what = "a number (YAML reads 1e-4 as text: write 1.0e-4)"
        value = self._typed(name, (int, float), what, None)
        if value is not None and not value > 0:
            self.wrong(name, f"`{name}` must be above 0, not {value}")
        return None if value is None else float(value)

    def positive(self, name: str, default: float) -> float:
        value = self.optional_positive(name)
        return default if value is None else value

    def fraction(self, name: str) -> float | None:
        """A share above 0 and up to 1, or None."""
        value = self.optional_positive(name)
        if value is not None and value > 1:
            self.wrong(name, f"`{name}` is a share of the data, from 0 to 1, not {value}")
        return value

    def share(self, name: str, default: float) -> float:
        """A number from 0 up, below 1."""
        value = float(self._typed(name, (int, float), "a number", default))
        if not 0 <= value < 1:
            self.wrong(name, f"`{name}` must be from 0 to below 1, not {value}")
        return value

    def weight(self, name: str, default: float) -> float:
        """A number from 0 up."""
        value = float(self._typed(name, (int, float), "a number", default))
        if not value >= 0:
            self.wrong(name, f"`{name}` is negative: {value}")
        return value

    def choice(self, name: str, among: Sequence[str], default: str) -> str:
        value = self.text(name, default)
        if value not in among:
            near = nearest(value, among)
            fail("G502", f"`{value}` is no `{name}`", site=self.at(name), wanted=", ".join(among),
                 found=value, help=f"write `{near}`" if near else None)  # fmt: skip
        return value

    def _list(self, name: str, default: Any) -> Sequence[Any]:
        return self._typed(name, (list, tuple), "a list", default)

    def texts(self, name: str, default: Any = _REQUIRED) -> list[str]:
        return self._all(name, (str,), "text", default)

    def integers(self, name: str, default: Any = _REQUIRED) -> list[int]:
        return self._all(name, (int,), "a whole number", default)

    def numbers(self, name: str, default: Any = _REQUIRED) -> list[float]:
        """Numbers, whole ones too."""
        return [float(value) for value in self._all(name, (int, float), "a number", default)]

    def sizes(self, name: str) -> list[int | str]:
        """Dimensions: numbers, or names of dynamic ones."""
        return self._all(name, (int, str), "a size or the name of one", _REQUIRED)

    def _all(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> list[Any]:
        values = list(self._list(name, default))
        for i, value in enumerate(values):
            if not isinstance(value, kinds) or _is_stray_bool(value, kinds):
                fail("G502", f"`{name}` holds what is not {what}", site=self.at(f"{name}.{i}"),
                     wanted=what, found=repr(value))  # fmt: skip
        return values

    def table(self, name: str) -> Table:
        return Table(self.take(name), self.at(name))

    def tables(self, name: str, default: Any = _REQUIRED) -> list[Table]:
        rows = self._list(name, default)
        return [Table(row, self.at(f"{name}.{i}")) for i, row in enumerate(rows)]


def _is_stray_bool(value: Any, kinds: tuple[type, ...]) -> bool:
    """`true` is an int in Python, but not where a number is meant."""
    return isinstance(value, bool) and bool not in kinds
