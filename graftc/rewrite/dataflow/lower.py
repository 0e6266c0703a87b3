"""Terms of a rewrite as ATen calls: `linear(x, w)` → `aten.linear.default`, its arguments in the schema's order.

One lowering serves both a graph, where a call becomes a node, and tensors, where it is run (new parameters).
Arithmetic on captured numbers is done at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graftc.diagnostics import Span, fail
from graftc.language.dataflow_ops import OPS, AtenForm, OpWord
from graftc.language.rules import Constant, ListTerm, OpTerm, Ref, SiteTerm, SpreadTerm, Term
from graftc.rewrite.dataflow.view import aten

_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "pow": operator.pow, "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "abs": abs,
    "rsqrt": lambda x: 1 / math.sqrt(x), "square": lambda x: x * x, "reciprocal": lambda x: 1 / x,
    "maximum": max, "minimum": min,
}  # fmt: skip


@dataclass(frozen=True)
class Lowering:
    """`emit` makes a call (a node, or a result); `site` calls a bound site; `names` are what is known.

    `absent_is_zero`: a weight that is not there (a linear without bias) counts as zero, as it does in the model.
    """

    emit: Callable[[Any, tuple[Any, ...], dict[str, Any], Span], Any]
    names: dict[str, Any]
    is_tensor: Callable[[Any], bool]
    site: Callable[[SiteTerm, tuple[Any, ...] | None], Any]
    absent_is_zero: bool = False

    def term(self, term: Term) -> Any:
        """The value of a term. Raises GraftError."""
        match term:
            case Ref(name=name):
                if name not in self.names:
                    fail("G375", f"`{name}` has no value here", span=term.span)
                return self.names[name]
            case Constant():
                return term.value
            case ListTerm():
                items: list[Any] = []
                for item in term.items:
                    value = self.term(item)
                    items += value if isinstance(item, SpreadTerm) else [value]
                return tuple(items)
            case SpreadTerm(name=name):
                return self.names[name]
            case SiteTerm():
                args = None if term.args is None else tuple(self.term(a) for a in term.args)
                return self.site(term, args)
            case OpTerm():
                return self._op(term)
            case _:
                fail("G374", "this stands in `match` only", span=term.span)

    def _op(self, term: OpTerm) -> Any:
        name = term.ops[0]
        word = OPS.get(name)
        if word is None:
            return self._by_aten_name(term, name)
        given: list[Any] = []
        said: list[bool] = []
        for at, argument in enumerate(term.args):
            if isinstance(argument, SpreadTerm):
                rest = list(self.names[argument.name])
                given += rest[: len(term.args) - at]
                said += [True] * (len(term.args) - at)
                break
            default = word.parameters[at].default
            given.append(default if argument is None else self.term(argument))
            said.append(argument is not None)
        if self.absent_is_zero and self._absent(word, given, said):
            return self._of_absent(term, name, given)
        if name in _NUMBERS and not any(self.is_tensor(g) for g in given):
            return self._number(term, name, [g for g, s in zip(given, said, strict=True) if s])
        return self._call(term, word, given, said)

    def _absent(self, word: OpWord, given: list[Any], said: list[bool]) -> bool:
        return any(
            value is None or (isinstance(value, tuple) and None in value)
            for value, was_said, parameter in zip(given, said, word.parameters, strict=True)
            if was_said and parameter.kind in ("value", "values")
        )

    def _of_absent(self, term: OpTerm, name: str, given: list[Any]) -> Any:
        """Zero times anything is zero, zero and x is x; what would need zeros written out is an error."""
        if name in ("add", "sub") and given[0] is not None:
            return given[0]
        if name == "add":
            return given[1]
        if name in ("mul", "matmul", "mm"):
            return None
        items: Any = given[0] if isinstance(given[0], tuple) else (given[0],)
        if all(i is None for i in items):
            return None
        fail(
            "G385",
            f"`{term.span.text}`: one of these weights is not there, others are",
            span=term.span,
            wanted="all of them, or none",
            help="add a guard, such as `where b is parameter`",
        )

    def _number(self, term: OpTerm, name: str, given: list[Any]) -> Any:
        if any(isinstance(g, (tuple, str)) or g is None for g in given):
            fail("G372", f"`{name}` takes tensors or numbers", span=term.span, found=repr(given))
        try:
            return _NUMBERS[name](*given)
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            fail(
                "G372",
                f"`{term.span.text}` has no value: {error}",
                span=term.span,
                found=repr(given),
            )

    def _call(self, term: OpTerm, word: OpWord, given: list[Any], said: list[bool]) -> Any:
        if word.name == "div" and not self.is_tensor(given[0]):
            inverse = self.emit(aten("reciprocal.default"), (given[1],), {}, term.span)
            return self.emit(aten("mul.Tensor"), (inverse, given[0]), {}, term.span)
        if word.commutes == (0, 1) and not self.is_tensor(given[0]):
            given[:2] = given[1::-1]
        form = self._form(term, word, given, said)
        args, kwargs = arguments(aten(form.target), word, form, given)
        return self.emit(aten(form.target), args, kwargs, term.span)

    def _form(self, term: OpTerm, word: OpWord, given: list[Any], said: list[bool]) -> AtenForm:
        """The first overload that takes what is given."""
        for form in word.forms:
            target = aten(form.target)
            if target is None or "unbiased" in form.arguments:
                continue
            types = {a.name: str(a.type) for a in target._schema.arguments}
            for argument, value, was_said, parameter in zip(
                form.arguments, given, said, word.parameters, strict=True
            ):
                if isinstance(argument, str):
                    if not self._takes(types[argument], value):
                        break
                elif was_said and value != (parameter.default if argument is None else argument):
                    break
            else:
                return form
        fail(
            "G372",
            f"`{word.name}` does not take these arguments",
            span=term.span,
            wanted=word.signature,
            found=", ".join("a tensor" if self.is_tensor(g) else repr(g) for g in given),
        )

    def _takes(self, kind: str, value: Any) -> bool:
        if value is None:
            return kind.startswith("Optional") or kind.endswith("?")
        if self.is_tensor(value):
            return "Tensor" in kind or "int" in kind  # a size is a node too
        if "Tensor" in kind:
            return ("List" in kind and isinstance(value, tuple)) or isinstance(value, (int, float))
        if isinstance(value, tuple):
            return "List" in kind
        if isinstance(value, str):
            return "str" in kind or "int" in kind  # a dtype
        return "str" not in kind

    def _by_aten_name(self, term: OpTerm, name: str) -> Any:
        target = aten(name.removeprefix("aten."))
        if target is None:
            fail("G371", f"this torch has no `{name}`", span=term.op_span)
        args = [a for a in term.args if a is not None]
        given = tuple(
            v
            for a in args
            for v in (self.term(a) if isinstance(a, SpreadTerm) else (self.term(a),))
        )
        return self.emit(target, given, {n: self.term(t) for n, t in term.named}, term.span)


def arguments(
    target: Any, word: OpWord, form: AtenForm, given: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, those at their default left out from the end."""
    by_name = {a: g for a, g in zip(form.arguments, given, strict=True) if isinstance(a, str)}
    constants = {
        a.name: by_name.get(a.name, a.default_value if a.has_default_value() else None)
        for a in target._schema.arguments
    }
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    needed = 0
    for at, entry in enumerate(target._schema.arguments):
        value = _typed(constants[entry.name], str(entry.type))
        default = entry.default_value if entry.has_default_value() else _MISSING
        at_default = default is not _MISSING and _equal(value, default)
        if entry.kwarg_only:
            if not at_default:
                kwargs[entry.name] = value
            continue
        args.append(value)
        if not at_default:
            needed = at + 1
    return tuple(args[:needed]), kwargs


_MISSING = object()


def _equal(value: Any, default: Any) -> bool:
    plain = (int, float, bool, str, type(None), list, tuple)
    return isinstance(value, plain) and value == default  # pyright: ignore[reportUnknownVariableType]


def _typed(value: Any, kind: str) -> Any:
    """A number where a list of sizes is wanted, a dtype by its name."""
    if isinstance(value, str) and "str" not in kind:
        return getattr(torch, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and "List" in kind:
        return [value]
    if isinstance(value, tuple) and "List" in kind:
        return list(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return value
