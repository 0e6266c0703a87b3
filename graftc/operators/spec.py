"""What graftc knows of an operator without importing torch.

A spec names the operator's arguments, the slots of its parameters, its default first
weights for each role, and its cost; `check`, `plan` and an editor read it. The module that
computes stands in the family's file and is found through `OperatorSpec.module`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

Kind = Literal["int", "float", "bool", "symbol"]
Value = Union[int, float, bool, str, None]


@dataclass(frozen=True)
class OfSite:
    """A default that is the site's own: `dim`, `heads`, `causal`, `activation`, …"""

    fact: str


@dataclass(frozen=True)
class Arg:
    """An argument: its kind, its default (`OfSite`, a value, or `required`), the values it may take."""

    name: str
    kind: Kind
    default: OfSite | Value = None
    required: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    doc: str = ""


@dataclass(frozen=True)
class Part:
    """A source of weights: a part of a matched site (`a.q`), or the whole site (`name` None)."""

    site: str
    name: str | None = None


@dataclass(frozen=True)
class Apply:
    """A source of weights: an init policy applied to sources (`concat(a.q, a.k)`, `zero`, `keep_top(m, by = magnitude)`)."""

    policy: str
    args: tuple[InitSource, ...] = ()
    options: Mapping[str, InitSource] = field(default_factory=dict)


@dataclass(frozen=True)
class Const:
    """A number or a symbol given to a policy."""

    value: Value


InitSource = Union[Part, Apply, Const]


@dataclass(frozen=True)
class Slot:
    """A named piece of an operator's new parameters that `init` can fill.

    `module` is the submodule's path inside the operator ('' for the operator itself);
    `rows` names a slice of its output rows as (index, of how many equal parts), None for all.
    A slot covers the submodule's weight and bias together unless `parameter` names one.
    """

    name: str
    module: str
    rows: tuple[int, int] | None = None
    parameter: str | None = None
    doc: str = ""


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of one forward pass of one sample: the operator proper and its featurisers (projections, convolutions)."""

    params: int
    operator_flops: int
    featuriser_flops: int

    @property
    def flops(self) -> int:
        return self.operator_flops + self.featuriser_flops


@dataclass(frozen=True)
class OperatorSpec:
    """An operator as data.

    `roles`: which roles of site it can replace. `mixes`: what it mixes. `keeps`: what of a site it
    carries over ('mask', 'rotary', 'groups', 'causal'); replacing a site that has one it does not keep is an
    error unless the rule says `drop`. `causal`: 'argument' if `causal` is an argument. `inits`: role →
    slot → source, the site being called `site`. `groups`: trainable groups by name → slot names.
    `cost(arguments, tokens)` is a pure function of the resolved arguments.
    """

    name: str
    module: str
    summary: str
    roles: tuple[str, ...]
    mixes: Literal["tokens", "channels", "nothing"]
    args: tuple[Arg, ...]
    slots: tuple[Slot, ...]
    inits: Mapping[str, Mapping[str, InitSource]]
    cost: Callable[[Mapping[str, Value], int], Cost]
    keeps: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""

    def arg(self, name: str) -> Arg | None:
        return next((a for a in self.args if a.name == name), None)
