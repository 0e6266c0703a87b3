"""A Python function as a dataflow pattern: traced by make_fx, normalised as models are, written as terms.

The result is the DataflowMatch that a person would have written, so what follows knows no difference. The
function is traced at two sizes and with two values of each number: what then differs is no pattern.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from graftc.diagnostics import Diagnostic, GraftError, fail
from graftc.language.dataflow_ops import OPS
from graftc.language.rules import (
    Binds,
    Constant,
    DataflowMatch,
    ListTerm,
    OpTerm,
    PythonMatch,
    Ref,
    Term,
)
from graftc.program.flat import Op
from graftc.program.model import user_error
from graftc.program.normalise import normalise
from graftc.rewrite.dataflow.pattern import GETITEM
from graftc.rewrite.dataflow.view import ProgramView, graph_ops, program_view

_RANKS = (4, 3, 2, 1)
_MOST_TENSORS = 5
_SIZES = (4, 6)
_NUMBERS = ((0.7531, 0.6427, 0.5813, 0.4919), (0.8237, 0.7193, 0.3571, 0.2843))
"""Two values for each number that the function is given: no number that a person writes."""


def captured(function: Callable[..., Any], match: PythonMatch) -> DataflowMatch:
    """The pattern that `function` is.

    Parameters annotated `float` are numbers, the others tensors, of the first ranks (the same for all, 4 to 1, or
    mixed) at which the function runs. Raises GraftError, G435, where it does not run, or is no pattern.
    """
    given = inspect.signature(function).parameters
    numbers = tuple(n for n in match.inputs if given[n].annotation in (float, "float"))
    tensors = tuple(n for n in match.inputs if n not in numbers)
    if not tensors or len(tensors) > _MOST_TENSORS or len(numbers) > len(_NUMBERS[0]):
        fail("G435", f"a pattern reads 1 to {_MOST_TENSORS} tensors and up to {len(_NUMBERS[0])} numbers",
             span=match.span, found=f"{len(tensors)} tensors, {len(numbers)} numbers")  # fmt: skip
    ranks = _ranks(function, match, tensors, dict(zip(numbers, _NUMBERS[0], strict=False)))
    first, second = (
        _traced(function, match, tensors, ranks, size, dict(zip(numbers, values, strict=False)))
        for size, values in zip(_SIZES, _NUMBERS, strict=True)
    )
    if first != second:
        fail(
            "G435",
            f"`{match.user.name}` computes with a size, or with a number before its ops do",
            span=match.span,
            wanted="ops on its tensors, and its numbers as they are",
            found=_difference(first, second),
            help="make it a parameter of its own: `scale: float`",
        )
    return first


def _ranks(
    function: Callable[..., Any],
    match: PythonMatch,
    names: Sequence[str],
    numbers: dict[str, float],
) -> tuple[int, ...]:
    """The first ranks at which the function runs; what it raised at equal ranks, where it runs at none."""
    kept: Exception | None = None
    choices = sorted(
        product(_RANKS, repeat=len(names)), key=lambda r: (len(set(r)), [-x for x in r])
    )
    for ranks in choices:
        values = {n: torch.ones((_SIZES[0],) * r) for n, r in zip(names, ranks, strict=True)}
        try:
            with torch.no_grad():
                function(**values, **numbers)
        except Exception as error:  # tried at other ranks
            kept = kept or error
            continue
        return ranks
    assert kept is not None
    told = user_error(kept, f"`{match.user.name}`", match.user.file.name)
    assert isinstance(told, GraftError)
    raise GraftError(
        *(replace(d, code="G435", span=match.span, site=None) for d in told.diagnostics)
    )


def _traced(
    function: Callable[..., Any],
    match: PythonMatch,
    names: Sequence[str],
    ranks: tuple[int, ...],
    size: int,
    numbers: dict[str, float],
) -> DataflowMatch:
    def run(*values: Tensor) -> Any:
        return function(**dict(zip(names, values, strict=True)), **numbers)

    examples = [torch.ones((size,) * r) for r in ranks]
    try:
        module = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*examples)
    except Exception as error:  # the user's code may raise anything
        told = user_error(error, f"`{match.user.name}`", match.user.file.name)
        assert isinstance(told, GraftError)
        raise GraftError(
            *(replace(d, code="G435", span=match.span, site=None) for d in told.diagnostics)
        ) from error
    normalise(module)
    return _Writer(module.graph, match, names, {v: n for n, v in numbers.items()}).match()


class _Writer:
    """Terms of a traced graph, all at the place of the rule's `match`."""

    def __init__(
        self, graph: fx.Graph, match: PythonMatch, names: Sequence[str], numbers: dict[float, str]
    ) -> None:
        self.flat = graph_ops(graph)
        self.view: ProgramView = program_view(self.flat)
        self.pattern, self.span, self.numbers = match, match.span, numbers
        self.names: dict[int, str] = {}
        self.used: set[str] = set()
        inputs = [op for op in self.flat.ops if op.kind == "input"]
        for op, name in zip(inputs, names, strict=True):
            self.names[op.index] = name
        self.input_names = tuple(names)
        returned = self._returned()
        self.written = {op.index: n for op, n in zip(returned, match.outputs, strict=True)}

    def _returned(self) -> tuple[Op, ...]:
        outputs = self.flat.outputs
        plain = [o for o in outputs if o.kind == "op"]
        if len(outputs) != len(self.pattern.outputs) or len(plain) != len(outputs):
            fail(
                "G435",
                f"`{self.pattern.user.name}` does not return what its ops make",
                span=self.span,
                wanted=f"{len(self.pattern.outputs)} tensors that it computes",
                found=f"{len(plain)}",
            )
        return outputs

    def match(self) -> DataflowMatch:
        statements: list[Binds] = []
        for op in self.flat.ops:
            if op.kind == "input" or (op.kind == "op" and self.view.op(op) == GETITEM):
                continue
            if op.kind != "op":
                self._refuse("reads a tensor of its own, a constant", str(op.target))
            items = [u for u in op.users if self.view.op(u) == GETITEM]
            value = self._op(op)
            statements.append(Binds(self._targets(op, items), value, self.span))
        missing = [n for n in (*self.input_names, *self.numbers.values()) if n not in self.used]
        if missing:
            self._refuse(f"makes nothing of `{missing[0]}` as it is given", missing[0])
        return DataflowMatch(tuple(statements), self.span)

    def _targets(self, op: Op, items: Sequence[Op]) -> tuple[Ref, ...]:
        if not items:
            return (self._named(op),)
        values = op.node.meta["val"] if op.node is not None else ()
        taken = {u.args[1]: u for u in items}
        return tuple(
            self._named(taken[i]) if i in taken else Ref(f"_{op.index}_{i}", self.span)
            for i in range(len(values))
        )

    def _named(self, op: Op) -> Ref:
        self.names[op.index] = self.written.get(op.index, f"{self.pattern.user.name}.{op.index}")
        return Ref(self.names[op.index], self.span)

    def _op(self, op: Op) -> OpTerm:
        name = self.view.op(op)
        given = self.view.args(op)
        if name not in OPS or given is None:
            name, args, kwargs = self.view.raw(op)
            named = tuple((n, self._term(v)) for n, v in kwargs.items())
            return OpTerm((name,), tuple(map(self._term, args)), self.span, self.span, named)
        terms: list[Term | None] = []
        for value, parameter in zip(given, OPS[name].parameters, strict=True):
            unsaid = not parameter.required and (
                parameter.default == "any" or _same(value, parameter.default)
            )
            terms.append(None if unsaid else self._term(value))
        return OpTerm((name,), tuple(terms), self.span, self.span)

    def _term(self, value: Any) -> Term:
        if isinstance(value, Op):
            name = self.names[value.index]
            self.used.add(name)
            return Ref(name, self.span)
        if isinstance(value, (tuple, list)):
            items: Sequence[Any] = value  # pyright: ignore[reportUnknownVariableType]
            return ListTerm(tuple(map(self._term, items)), self.span)
        if isinstance(value, float) and value in self.numbers:
            self.used.add(self.numbers[value])
            return Ref(self.numbers[value], self.span)
        if value is None or isinstance(value, (bool, int, float, str)):
            return Constant(value, self.span)
        self._refuse("has an argument that no pattern can hold", str(value))

    def _refuse(self, why: str, found: str) -> NoReturn:
        message = f"`{self.pattern.user.name}` {why}"
        raise GraftError(Diagnostic("G435", message, span=self.span, found=found))


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _difference(first: DataflowMatch, second: DataflowMatch) -> str:
    """The constants of the first op that differs."""

    def constants(term: Term | None) -> list[Any]:
        match term:
            case Constant():
                return [term.value]
            case OpTerm():
                return [c for a in term.args for c in constants(a)]
            case ListTerm():
                return [c for a in term.items for c in constants(a)]
            case _:
                return []

    for a, b in zip(first.statements, second.statements, strict=False):
        if a != b and isinstance(a.value, OpTerm):
            found = [
                x for x, y in zip(constants(a.value), constants(b.value), strict=False) if x != y
            ]
            return f"`{a.value.ops[0]}` with {', '.join(map(str, found)) or 'other operands'}"
    return "another number of ops"
