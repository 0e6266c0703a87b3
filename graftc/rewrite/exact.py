"""Exact rules are proved by running: the edited model against the original, on random inputs, real weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.diagnostics import fail
from graftc.program.analysis import Analysis
from graftc.program.model import Model
from graftc.program.program import Program
from graftc.rewrite.apply import apply
from graftc.rewrite.dataflow.proof import TOLERANCE, proof_text, prove, relative_difference
from graftc.rewrite.plan import Plan


def check_exact(
    plan: Plan, analysis: Analysis, model: Model, initialise: Callable[[Plan, Program], None]
) -> tuple[str, ...]:
    """A line for each rule that says `exact`; a GraftError where it is not.

    The rule's edits alone are applied, and the outputs compared relative to the largest output.
    """
    said: list[str] = []
    for selection in plan.selections:
        rule = selection.rule
        if rule.contract != "exact":
            continue
        from dataclasses import replace

        alone = replace(plan, steps=tuple(s for s in plan.steps if s.edit.rule is rule))
        student, _ = apply(analysis.program, alone.edits)
        initialise(alone, student)
        error, dtype = difference(analysis.program, student, model.inputs)
        limit = TOLERANCE.get(dtype, 1e-5)
        if not error <= limit:
            fail(
                "G370",
                f"rule `{rule.name}` says exact, and changes the outputs",
                span=rule.span,
                wanted=f"a relative difference of at most {limit:g} in {str(dtype).removeprefix('torch.')}",
                found=f"{error:.3g}",
                help="leave out `exact`, or give an init that keeps the function",
            )
        said.append(
            f"rule `{rule.name}` is exact: relative difference {error:.2g}, limit {limit:g}"
        )
        proofs = [
            prove(rule, e.ops, analysis.program) for e in alone.edits if e.ops is not None
        ]  # with the model's own weights, at every place
        if proofs:
            said.append(proof_text(rule, proofs))
    return tuple(said)


def difference(
    before: Program, after: Program, inputs: Mapping[str, Any]
) -> tuple[float, torch.dtype]:
    """The largest difference of any output relative to its largest number, and the outputs' dtype."""
    named = _named_tensors(inputs)
    given = [_noised(named[p.name]) for p in before.inputs]
    with torch.no_grad():
        wanted, found = _tensors(before.root(*given)), _tensors(after.root(*given))
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        worst = max(worst, relative_difference(a, b))
    return worst, wanted[0].dtype


def _named_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by the names that capture gives them: those inside dicts and tuples by their way down."""
    found: dict[str, Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]
                visit(f"{name}_{key}" if name else str(key), item)
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):  # pyright: ignore[reportUnknownVariableType]
                visit(f"{name}_{i}", item)

    visit("", inputs)
    return found


def _noised(value: Tensor) -> Tensor:
    """Random floats in place of an example's: an example of zeros would prove nothing."""
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(value.shape, generator=generator).to(value)
    return value


def _tensors(outputs: Any) -> list[Tensor]:
    items = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [t for t in items if isinstance(t, Tensor) and t.is_floating_point()]
