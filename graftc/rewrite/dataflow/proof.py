"""An exact rewrite is proved by running it: the ops that were there and those that came, on the same random inputs.

In float64 the two must agree to rounding, which no accident does; in the model's own dtype to that dtype's
rounding. Weights are the model's where it has them, random where it was captured without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graftc.diagnostics import Span, fail
from graftc.language.rules import Rewrite, Rule, SiteTerm
from graftc.program.flat import Op
from graftc.program.program import Program, size_hint
from graftc.rewrite.dataflow.lower import Lowering
from graftc.rewrite.dataflow.pattern import NodeRef
from graftc.rewrite.dataflow.region import Argument, Region

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""The largest difference, relative to the largest number, that counts as rounding."""

MOST_NUMBERS = 100_000_000


@dataclass(frozen=True)
class Proof:
    """Largest relative differences of a region's outputs, by dtype; `not_run` says why there is none."""

    differences: Mapping[torch.dtype, float]
    not_run: str = ""


def prove(rule: Rule, region: Region, program: Program) -> Proof:
    """Runs a region before and after its rewrite. Raises GraftError (G388) where they differ."""
    assert isinstance(rule.edit, Rewrite)
    if region.sites:
        return Proof({}, "it calls a site, which only the whole model's check runs")
    leaves = _leaves(region)
    if sum(_numbers(op) for op in leaves) > MOST_NUMBERS:
        return Proof({}, "its inputs are too large")
    outputs = list(rule.edit.outputs)
    own = next(
        (o.tensor.dtype for o in region.occurrence.values if _is_float(o.tensor)), torch.float32
    )
    found: dict[torch.dtype, float] = {}
    for dtype in dict.fromkeys((torch.float64, own)):
        run = _Run(region, program, dtype)
        before = [run.value(_op(region, name)) for name in outputs]
        after = run.rewritten(rule.edit)
        worst = max(relative_difference(b, after[n]) for b, n in zip(before, outputs, strict=True))
        limit = TOLERANCE.get(dtype, 1e-5)
        found[dtype] = worst
        if not worst <= limit:
            fail(
                "G388",
                f"rule `{rule.name}` says exact, and changes what it rewrites",
                span=rule.span,
                site=region.name,
                wanted=f"a relative difference of at most {limit:g} in {_name(dtype)}",
                found=f"{worst:.3g} on random inputs",
                help="leave out `exact`, or correct the rewrite",
            )
    return Proof(found)


def proof_text(rule: Rule, proofs: list[Proof]) -> str:
    """One line for all the proofs of a rule."""
    ran = [p for p in proofs if not p.not_run]
    if not ran:
        return f"rule `{rule.name}`: exact NOT RUN ({proofs[0].not_run})"
    parts: list[str] = []
    for dtype in dict.fromkeys(d for p in ran for d in p.differences):
        worst = max(p.differences.get(dtype, 0.0) for p in ran)
        parts.append(f"{worst:.2g} in {_name(dtype)} (limit {TOLERANCE.get(dtype, 1e-5):g})")
    left = f", NOT RUN at {len(proofs) - len(ran)}" if len(ran) < len(proofs) else ""
    return f"rule `{rule.name}` is exact at {len(ran)} places: relative difference {', '.join(parts)}{left}"


def signature(region: Region) -> tuple[Any, ...]:
    """Equal for regions that one proof on random weights serves."""
    shapes = tuple(
        (tuple(map(str, o.tensor.shape)), str(o.tensor.dtype)) if o.tensor is not None else None
        for o in (*_leaves(region), *region.occurrence.values)
    )
    constants = tuple(
        (n, str(v)) for n, v in region.outside.items() if not isinstance(v, (Argument, tuple))
    )
    return (region.occurrence.pattern, shapes, constants)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_float(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def _op(region: Region, name: str) -> Op:
    result = region.occurrence.pattern.results[name]
    assert isinstance(result, NodeRef)
    return region.occurrence.values[result.index]


def _leaves(region: Region) -> list[Op]:
    """What the region's ops read from outside."""
    inside = set(region.occurrence.values)
    found = {s: None for op in region.occurrence.values for s in op.operands if s not in inside}
    return list(found)


def _numbers(op: Op) -> int:
    count = 1
    for size in op.tensor.shape if op.tensor is not None else ():
        count *= size_hint(size)
    return count


@dataclass
class _Run:
    """One run in a dtype: values by op, drawn where they come from outside."""

    region: Region
    program: Program
    dtype: torch.dtype
    known: dict[Op, Any] = field(default_factory=dict[Op, Any])
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def value(self, op: Op) -> Any:
        if op not in self.known:
            inside = op in self.region.occurrence.values
            self.known[op] = self._computed(op) if inside else self._drawn(op)
        return self.known[op]

    def _computed(self, op: Op) -> Any:
        args, kwargs = self._of(op.args), self._of(op.kwargs)
        with torch.no_grad():
            return op.target(*args, **kwargs)

    def _of(self, argument: Any) -> Any:
        if isinstance(argument, Op):
            return self.value(argument)
        if isinstance(argument, tuple):
            return [self._of(a) for a in argument] if argument and self._is_list(argument) else tuple(
                self._of(a) for a in argument
            )  # fmt: skip
        if isinstance(argument, dict):
            return {k: self._of(v) for k, v in argument.items()}  # pyright: ignore[reportUnknownVariableType]
        return argument

    def _is_list(self, argument: tuple[Any, ...]) -> bool:
        """Lists inside arguments were made tuples; the arguments themselves are one."""
        return not any(argument is op.args for op in self.region.occurrence.values)

    def _drawn(self, op: Op) -> Any:
        if op.tensor is None:
            return size_hint(op.node.meta["val"])
        if op.kind == "param":
            path, _, leaf = op.fqn.rpartition(".")
            tensor: Tensor = getattr(self.program.root.get_submodule(path), leaf).detach()
            if tensor.device.type != "meta":
                return tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        shape = tuple(size_hint(s) for s in op.tensor.shape)
        if op.tensor.is_floating_point():
            return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return torch.randint(0, 2, shape, generator=self.generator).to(op.tensor.dtype)

    def rewritten(self, edit: Rewrite) -> dict[str, Any]:
        """The outputs' new values."""
        occurrence = self.region.occurrence
        names: dict[str, Any] = {n: s for n, s in occurrence.sizes.items() if isinstance(s, int)}
        names |= {n: self._of(v) for n, v in occurrence.names.items()}
        for name, result in occurrence.pattern.results.items():
            if isinstance(result, NodeRef):
                names[name] = self.value(occurrence.values[result.index])

        def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], span: Span) -> Any:
            with torch.no_grad():
                return target(*args, **kwargs)

        def no_site(term: SiteTerm, args: Any) -> Any:
            raise AssertionError(term.binding)

        def is_tensor(value: Any) -> bool:
            return isinstance(value, Tensor)

        weights = Lowering(emit, dict(names), is_tensor, no_site, True)
        for new in edit.new:
            names[new.name] = weights.term(new.value)
        lowering = Lowering(emit, names, is_tensor, no_site)
        found: dict[str, Any] = {}
        for statement in edit.statements:
            made = lowering.term(statement.value)
            items = tuple(made) if len(statement.targets) > 1 else (made,)
            for target, item in zip(statement.targets, items, strict=True):
                if target.name in edit.outputs:
                    found[target.name] = item
                else:
                    names[target.name] = item
        return found


def relative_difference(before: Any, after: Any) -> float:
    """The largest difference relative to the largest finite number of `before`; NaN in one alone is infinite."""
    if (
        not isinstance(before, Tensor)
        or not isinstance(after, Tensor)
        or before.shape != after.shape
    ):
        return float("inf")
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else float("inf")
    if not before.numel():
        return 0.0
    equal_nan = before.isnan() & after.isnan()
    gap = torch.where(equal_nan | (before == after), 0.0, (after - before).abs().double())
    scale = (
        before[before.isfinite()].abs().max()
        if bool(before.isfinite().any())
        else before.new_ones(())
    )
    found = float(gap.max() / scale.double().clamp_min(torch.finfo(before.dtype).tiny))
    return float("inf") if math.isnan(found) else found
