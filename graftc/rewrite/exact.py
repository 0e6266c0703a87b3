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
from graftc.rewrite.plan import Plan

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


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
    return tuple(said)


def difference(
    before: Program, after: Program, inputs: Mapping[str, Any]
) -> tuple[float, torch.dtype]:
    """The largest difference of the outputs relative to the largest output, and their dtype."""
    given = [_noised(inputs[p.name]) for p in before.inputs]
    with torch.no_grad():
        wanted, found = _first(before.root(*given)), _first(after.root(*given))
    scale = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float((found - wanted).abs().max() / scale), wanted.dtype


def _noised(value: Any) -> Any:
    """Random floats in place of an example's: an example of zeros would prove nothing."""
    if isinstance(value, Tensor) and value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(value.shape, generator=generator).to(value)
    return value


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
