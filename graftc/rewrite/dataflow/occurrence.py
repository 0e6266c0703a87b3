"""A pattern laid onto a graph, and what of it is used outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftc.rewrite.dataflow.pattern import Node, NodeRef, Pattern, ValueRef
from graftc.rewrite.dataflow.view import View


@dataclass(frozen=True)
class SiteValue:
    """The call of a bound site: what it is given, and the site itself."""

    args: tuple[Any, ...]
    site: Any


Sites = Mapping[str, Mapping[Any, SiteValue]]
"""Binding → the results of the sites that it may be, with their calls."""


@dataclass(frozen=True, eq=False)
class Occurrence:
    """One way to lay a pattern onto a graph: a value for each node, and what the names outside stand for.

    `sizes`: what the names in shape guards stand for.
    """

    pattern: Pattern
    values: tuple[Any, ...]
    names: Mapping[str, Any]
    sites: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def value(self, name: str) -> Any:
        """What a name of the pattern stands for."""
        result = self.pattern.results.get(name)
        if isinstance(result, NodeRef):
            return self.values[result.index]
        if isinstance(result, ValueRef):
            return self.names[result.name]
        return self.names[name]


@dataclass(frozen=True, eq=False)
class Leak:
    """An inner value that is used outside: by `user`, or by the model's caller (None)."""

    node: Node
    value: Any
    user: Any


def leak(occurrence: Occurrence, view: View, returned: frozenset[int] = frozenset()) -> Leak | None:
    """The first inner value that something outside the match uses, or that the model returns."""
    inside = {id(v) for v in occurrence.values}
    for index in sorted(occurrence.pattern.inner):
        value = occurrence.values[index]
        for user in view.users(value):
            if id(user) not in inside:
                return Leak(occurrence.pattern.nodes[index], value, user)
        if getattr(value, "index", None) in returned:
            return Leak(occurrence.pattern.nodes[index], value, None)
    return None
