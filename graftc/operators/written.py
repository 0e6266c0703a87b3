"""An operator that is written in the language, as data: its ops in order, with symbolic sizes. No torch.

The language makes these (`graftc.language.written`), `graftc.operators.lowering` makes modules of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Union

from graftc.operators.spec import Arguments, Cost, Value

Factors = tuple[tuple[Union[str, "Rounded"], int], ...]
TOKENS = "tokens"


@dataclass(frozen=True)
class Rounded:
    """A size rounded to a whole number: `round(ratio * dim)`."""

    of: Dim

    def __str__(self) -> str:
        return f"round({self.of})"


@dataclass(frozen=True)
class Dim:
    """A size: a sum of products of named sizes, exponents below zero for a division.

    >>> dim, heads = Dim.named("dim"), Dim.named("heads")
    >>> (dim / heads) * heads == dim, str(3 * dim), (3 * dim).at({"dim": 8})
    (True, '3 * dim', 24)
    """

    terms: tuple[tuple[Factors, Fraction], ...]

    @staticmethod
    def of(terms: Mapping[Factors, Fraction]) -> Dim:
        return Dim(tuple(sorted(((k, v) for k, v in terms.items() if v), key=str)))

    @staticmethod
    def number(value: float) -> Dim:
        return Dim.of({(): Fraction(value).limit_denominator(10**6)})

    @staticmethod
    def named(name: str | Rounded) -> Dim:
        return Dim.of({((name, 1),): Fraction(1)})

    def __add__(self, other: Dim) -> Dim:
        found = dict(self.terms)
        for factors, count in other.terms:
            found[factors] = found.get(factors, Fraction(0)) + count
        return Dim.of(found)

    def __sub__(self, other: Dim) -> Dim:
        return self + Dim.number(-1) * other

    def __mul__(self, other: Dim) -> Dim:
        found: dict[Factors, Fraction] = {}
        for a, m in self.terms:
            for b, n in other.terms:
                factors = _times(a, b)
                found[factors] = found.get(factors, Fraction(0)) + m * n
        return Dim.of(found)

    def __rmul__(self, other: int) -> Dim:
        return Dim.number(other) * self

    def __truediv__(self, other: Dim) -> Dim:
        """By one product; ValueError by a sum, or by zero."""
        if len(other.terms) != 1:
            raise ValueError(f"{self} / ({other})")
        ((factors, count),) = other.terms
        return self * Dim.of({tuple((n, -e) for n, e in factors): 1 / count})

    def at(self, sizes: Mapping[str, Value]) -> int:
        """The size where each name has a value; ValueError where it is no whole number of at least 1."""
        total = self._at(sizes)
        if total.denominator != 1 or total < 1:
            raise ValueError(f"{self} is {float(total):g}, no size")
        return int(total)

    def _at(self, sizes: Mapping[str, Value]) -> Fraction:
        total = Fraction(0)
        for factors, count in self.terms:
            for name, exponent in factors:
                value = (
                    Fraction(round(name.of._at(sizes)))
                    if isinstance(name, Rounded)
                    else Fraction(str(sizes[name]))
                )
                count *= value**exponent
            total += count
        return total

    @property
    def names(self) -> frozenset[str]:
        """The named sizes in it."""
        found: set[str] = set()
        for factors, _ in self.terms:
            for name, _ in factors:
                found |= name.of.names if isinstance(name, Rounded) else {name}
        return frozenset(found)

    def __str__(self) -> str:
        return " + ".join(_text(f, c) for f, c in self.terms) or "0"


def _times(a: Factors, b: Factors) -> Factors:
    found = dict(a)
    for name, exponent in b:
        found[name] = found.get(name, 0) + exponent
    return tuple(sorted(((n, e) for n, e in found.items() if e), key=str))


def _text(factors: Factors, count: Fraction) -> str:
    above = [str(n) for n, e in factors for _ in range(e)]
    below = [str(n) for n, e in factors for _ in range(-e)]
    first = [str(count)] if count != 1 or not above else []
    return " * ".join([*first, *above]) + "".join(f" / {n}" for n in below)


Shape = tuple[Dim, ...]
"""Sizes without the batch, which every value has first."""


@dataclass(frozen=True)
class Given:
    """An argument of the operator, to be read when it is built; `equals`: whether it has this value."""

    name: str
    equals: Value = None

    def at(self, arguments: Arguments) -> Value:
        value = arguments[self.name]
        return value if self.equals is None else value == self.equals


Setting = Union[Value, Given, Dim, tuple[Dim, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One op. `inputs` are indices of earlier values (0.. are the operator's inputs), or numbers.

    It makes `shapes` values, numbered on from those before. `name`: of the submodule that holds its
    parameters. `mixing`: whether a result at a token depends on others: 'no', 'earlier' ones only,
    'all', or as its `causal` setting says.
    """

    op: str
    inputs: tuple[int | Number, ...]
    shapes: tuple[Shape, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    name: str | None = None
    mixing: Literal["no", "earlier", "all", "causal"] = "no"


@dataclass(frozen=True)
class Number:
    """A number among an op's inputs: itself, or an argument's."""

    value: float | Given | Dim

    def at(self, arguments: Arguments) -> float | int:
        if isinstance(self.value, Dim):
            return self.value.at(arguments)
        found = self.value.at(arguments) if isinstance(self.value, Given) else self.value
        if not isinstance(found, (int, float)):
            raise ValueError(f"{self.value} is no number")
        return found


@dataclass(frozen=True)
class Written:
    """The operator: its inputs' shapes, its ops, the values it returns."""

    name: str
    inputs: tuple[tuple[str, Shape], ...]
    steps: tuple[Step, ...]
    returns: tuple[int, ...]
    place: str = ""

    def live(self, arguments: Arguments) -> list[tuple[int, Step]]:
        """The ops that are computed with these arguments: (number of the first value it makes, op)."""
        first: list[int] = []
        maker: dict[int, int] = {}
        count = len(self.inputs)
        for i, step in enumerate(self.steps):
            first.append(count)
            maker |= dict.fromkeys(range(count, count + len(step.shapes)), i)
            count += len(step.shapes)
        needed: set[int] = set()
        waiting = list(self.returns)
        while waiting:
            i = maker.get(waiting.pop())
            if i is None or i in needed:
                continue
            needed.add(i)
            waiting += [v for v in chosen_inputs(self.steps[i], arguments) if isinstance(v, int)]
        return [(first[i], self.steps[i]) for i in sorted(needed)]

    def is_causal(self, arguments: Arguments) -> bool:
        """Whether no output depends on a later token."""
        for _, step in self.live(arguments):
            causal = step.settings.get("causal")
            value = causal.at(arguments) if isinstance(causal, Given) else causal
            if step.mixing == "all" or (step.mixing == "causal" and value is not True):
                return False
        return True

    def cost(self, arguments: Arguments, tokens: int) -> Cost:
        """Parameters, and FLOPs of products, linears and convolutions; element-wise work is not counted."""
        sizes = {**arguments, TOKENS: tokens, **dict.fromkeys(self.token_names, tokens)}
        shapes = {i: s for i, (_, s) in enumerate(self.inputs)}
        count = len(self.inputs)
        for step in self.steps:
            for shape in step.shapes:
                shapes[count] = shape
                count += 1
        params = operator = featuriser = 0
        for _, step in self.live(arguments):
            inside = [shapes[i] for i in step.inputs if isinstance(i, int)]
            params += _parameters(step, inside, sizes)
            work = _flops(step, inside, sizes)
            if step.name is None:
                operator += work
            else:
                featuriser += work
        return Cost(params, operator, featuriser)

    @property
    def token_names(self) -> tuple[str, ...]:
        """The sizes that vary from call to call: of the first axis of each input."""
        return tuple(dict.fromkeys(n for _, shape in self.inputs for n in shape[0].names))


def chosen_inputs(step: Step, arguments: Arguments) -> tuple[int | Number, ...]:
    """An op's inputs; of `choose`, the one that the arguments say."""
    if step.op != "choose":
        return step.inputs
    condition = step.settings["condition"]
    value = condition.at(arguments) if isinstance(condition, Given) else condition
    return (step.inputs[0 if value else 1],)


def _size(shape: Shape, sizes: Mapping[str, Value]) -> int:
    total = 1
    for dim in shape:
        total *= dim.at(sizes)
    return total


def _parameters(step: Step, inside: list[Shape], sizes: Mapping[str, Value]) -> int:
    if step.op == "linear":
        out, into = step.shapes[0][-1].at(sizes), inside[0][-1].at(sizes)
        return out * into + (out if step.settings["bias"] else 0)
    if step.op == "depthwise_conv":
        return inside[0][-1].at(sizes) * (_kernel(step, sizes) + 1)
    if step.op in ("layer_norm", "rms_norm") and step.name is not None:
        return inside[0][-1].at(sizes) * (2 if step.op == "layer_norm" else 1)
    return 0


def _kernel(step: Step, sizes: Mapping[str, Value]) -> int:
    kernel = step.settings["kernel"]
    assert isinstance(kernel, Dim)
    return kernel.at(sizes)


def _flops(step: Step, inside: list[Shape], sizes: Mapping[str, Value]) -> int:
    made = _size(step.shapes[0], sizes)
    if step.op in ("linear", "matmul"):
        return 2 * made * inside[0][-1].at(sizes)
    if step.op == "depthwise_conv":
        return 2 * made * _kernel(step, sizes)
    if step.op == "causal_sum":  # a running sum of k vᵀ, read by each q
        return 4 * made * inside[0][-1].at(sizes)
    return 0
