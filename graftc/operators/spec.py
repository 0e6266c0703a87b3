"""What graftc knows of an operator without importing torch.

A spec names the operator's arguments, the slots of its parameters, its default first
weights for each role, and its cost; `check`, `plan` and an editor read it. The module that
computes stands in the family's file and is found through `OperatorSpec.module`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Union

if TYPE_CHECKING:
    from pathlib import Path

    from graftc.operators.written import Written

Kind = Literal["int", "float", "bool", "symbol", "groups", "any"]
Value = Union[int, float, bool, str, None]
Arguments = Mapping[str, Value]

WHOLE = "*"
"""The slot name of a source that fills all of an operator at once (`keep_top(m, by = …)`)."""

SITE = "site"
"""The name under which a spec's default sources speak of the site that is replaced."""


def _no_mapping() -> Mapping[str, InitSource]:
    return {}


def _no_variants() -> Mapping[str, OperatorSpec]:
    return {}


def _no_groups() -> Mapping[str, tuple[str, ...]]:
    return {}


def holds(condition: str | None, arguments: Arguments) -> bool:
    """Whether the arguments meet a condition: `gated`, `feature=softmax_pair`, `qk_norm!=none`, several with `and`; None always.

    >>> holds("dims=2", {"dims": 2}), holds("dims!=2", {"dims": 2}), holds("gated", {"gated": False})
    (True, False, False)
    """
    if condition is None:
        return True
    if " and " in condition:
        return all(holds(part, arguments) for part in condition.split(" and "))
    name, unequal, value = condition.partition("!=")
    if unequal:
        return str(arguments.get(name)) != value
    name, _, value = condition.partition("=")
    return str(arguments.get(name)) == value if value else bool(arguments.get(name))


@dataclass(frozen=True)
class OfSite:
    """A default that is the site's own: `dim`, `heads`, `causal`, `activation`, …

    `otherwise`: where the site has none, if `optional`; else that is an error.
    """

    fact: str
    otherwise: Value = None
    optional: bool = False


@dataclass(frozen=True)
class Arg:
    """An argument: its kind, its default (`OfSite` or a value; else `required`), its limits.

    `minimum` is inclusive; `above` is an exclusive lower limit. `when`: the condition on earlier
    arguments without which it is None (`dims=2`).
    """

    name: str
    kind: Kind
    default: OfSite | Value = None
    required: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    doc: str = ""
    above: float | None = None
    when: str | None = None


@dataclass(frozen=True)
class Part:
    """A source of weights: a part of a matched site (`a.q`), or the whole site (`name` None)."""

    site: str
    name: str | None = None


@dataclass(frozen=True)
class Apply:
    """A source of weights: an init policy applied to sources.

    `concat(a.q, a.k)`, `zero`, `keep_top(m, by = magnitude)`. The policies and what they take
    stand in `graftc.weights.sources`.
    """

    policy: str
    args: tuple[InitSource, ...] = ()
    options: Mapping[str, InitSource] = field(default_factory=_no_mapping)


@dataclass(frozen=True)
class Const:
    """A number or a symbol given to a policy."""

    value: Value


InitSource = Union[Part, Apply, Const]


@dataclass(frozen=True)
class Slot:
    """A named piece of an operator's new parameters that `init` can fill.

    `module` is the submodule's path inside the operator ('' for the operator itself).
    `rows` names a part of its output rows as (index, of how many parts), None for all; the
    parts are equal unless `sizes(arguments)` says how many rows each has.
    A slot covers the submodule's weight and bias together unless `parameter` names one.
    `last`: the operator's output is this affine map's output, so that least squares can fit it.
    `when`: the condition without which the slot is absent (`gated`, `feature=softmax_pair`).
    """

    name: str
    module: str
    rows: tuple[int, int] | None = None
    parameter: str | None = None
    doc: str = ""
    sizes: Callable[[Arguments], tuple[int, ...]] | None = None
    last: bool = False
    when: str | None = None


@dataclass(frozen=True)
class UserClass:
    """A class or function of a Python file that a rule names: `python("ops.py:Mixer")`.

    `written`: what stands in the rule. `file`: its path, and `folder` the `.graft` file's. `found`: what it names,
    once the file is imported, which only its user can allow.
    """

    written: str
    file: Path
    folder: Path
    name: str
    found: Callable[..., object] | None = None


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of one forward pass of one sample.

    The operator proper and its featurisers (projections, convolutions) are counted apart.
    """

    params: int
    operator_flops: int
    featuriser_flops: int

    @property
    def flops(self) -> int:
        return self.operator_flops + self.featuriser_flops


@dataclass(frozen=True)
class Machine:
    """Where a student is to run, as the command line says it.

    `device`: cpu or cuda. `dtype`: fp32, fp16 or bf16. `to`: torch (eager and `torch.compile`), onnx or tensorrt.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    to: str = "torch"

    def __str__(self) -> str:
        return ", ".join((self.device, self.dtype, self.to))


CPU = Machine()
"""The default: torch on a CPU."""


@dataclass(frozen=True)
class Form:
    """One of several formulations of the same function.

    `wanted(arguments, machine, tokens)`: why it is taken there unless a rule says otherwise, None where it is not;
    `tokens` is None where their count is not known. `cannot(arguments)`: what of them it does not compute, None where
    nothing. `module`: the class that computes it, where that is not the operator's own. `package`: what it imports
    beside torch, as (name to import, name to install).
    """

    name: str
    wanted: Callable[[Arguments, Machine, int | None], str | None]
    cannot: Callable[[Arguments], str | None] = lambda arguments: None
    module: str = ""
    package: tuple[str, str] | None = None


@dataclass(frozen=True)
class OperatorSpec:
    """An operator as data.

    `module`: "package.file:Class"; the class is built by `cls(**arguments)`, all of `args` by name.
    `roles`: which roles of site it can replace. `mixes`: what it mixes. `keeps`: what of a site it
    carries over ('mask', 'rotary', 'groups', 'causal'); replacing a site that has one it does not
    keep is an error unless the rule says `drop`. `inits`: role → slot (or `WHOLE`) → source, the
    site being called `SITE`. `groups`: trainable groups by name → slot names.
    `cost(arguments, tokens)` is a pure function of the resolved arguments.
    `islands`: submodules ('' is the whole operator) that stay in float32 where a student is exported in half
    precision; what a `forward` casts to float32 itself need not stand here.
    `length`: 'fixed' if the module takes only the token count that it was built for, or the
    condition under which it does.
    `written`: the ops of an operator that is written in the language, which has no `module`.
    `variants`: role → the spec that takes this one's place there (another module, other slots).
    `linear`: rows in which the operator is linear while all else stands still, row c of each feeding
    channel c alone of what the last map reads: what alternating least squares fits, in this order.
    `forms`: of an operator with an argument `form`, what it can be; the first that is wanted fills one that is
    `auto` (`graftc.operators.forms`).
    `fitted`: from the arguments and the site's facts, slots that least squares fits after their
    default where the rule has no `init`: those of an operator that is exact at some sites only.
    `user`: the class of a Python file, for an operator that has no `module` either; what such a spec says
    of slots, cost and causality is measured at the site (`graftc.rewrite.user_operator`).
    """

    name: str
    module: str
    summary: str
    roles: tuple[str, ...]
    mixes: Literal["tokens", "channels", "nothing"]
    args: tuple[Arg, ...]
    slots: tuple[Slot, ...]
    inits: Mapping[str, Mapping[str, InitSource]]
    cost: Callable[[Arguments, int], Cost]
    keeps: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=_no_groups)
    source: str = ""
    length: str = "free"
    written: Written | None = None
    variants: Mapping[str, OperatorSpec] = field(default_factory=_no_variants)
    islands: tuple[str, ...] = ()
    linear: tuple[Slot, ...] = ()
    forms: tuple[Form, ...] = ()
    fitted: Callable[[Arguments, Mapping[str, object]], tuple[str, ...]] | None = None
    user: UserClass | None = None

    def arg(self, name: str) -> Arg | None:
        return next((a for a in self.args if a.name == name), None)

    def slot(self, name: str) -> Slot | None:
        return next((s for s in self.slots if s.name == name), None)

    def form(self, name: object) -> Form | None:
        return next((f for f in self.forms if f.name == name), None)

    def module_of(self, arguments: Arguments) -> str:
        """The class that computes with these arguments, as "package.file:Class"."""
        form = self.form(arguments.get("form"))
        return form.module if form is not None and form.module else self.module

    def is_fixed(self, arguments: Arguments) -> bool:
        """Whether it takes only the token count that it was built for."""
        return self.length == "fixed" or (self.length != "free" and holds(self.length, arguments))

    def for_role(self, role: str) -> OperatorSpec:
        """The spec that serves a site of `role`."""
        return self.variants.get(role, self)

    def is_causal(self, arguments: Arguments) -> bool:
        """Whether no output depends on a later token, so that a causal site may take it."""
        if self.mixes == "tokens" and self.written is not None:
            return self.written.is_causal(arguments)
        if self.user is not None:
            return self.mixes != "tokens" or "causal" in self.keeps
        return self.mixes != "tokens" or arguments.get("causal") is True
