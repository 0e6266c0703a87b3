"""Whether an installed kernel computes on the GPU at hand what the operator's own form does."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from graftc.operators.spec import Arguments, Form, Machine, OperatorSpec, Value

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2}
"""Relative error, of the output and of every gradient, up to which two forms agree."""
MOST = 0.1
"""Relative error that no kernel may have, however far off the own form is."""
TOKENS = 200
"""More than a chunk of any form, and no multiple of one."""


def disagreement(
    spec: OperatorSpec, form: Form, arguments: Arguments, machine: Machine
) -> str | None:
    """None where the form agrees, forward and backward, else what was found; run on the device of `machine`.

    What is right is the operator's own form in float64. The kernel may be as far from it as LIMITS say, or, where
    the dtype itself costs more (the gradients of a scan), twice as far as the own form in that dtype, but never
    more than MOST. A comparison that was made is kept for all sites that are alike; one that failed is made again.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here to compare it on"
    try:
        error, own = errors(spec.name, form.name, tuple(sorted(arguments.items())), machine)
    except Exception as problem:  # whatever a package of another version raises
        return f"it does not run here: {(str(problem) or type(problem).__name__).splitlines()[0]}"
    if not math.isfinite(own):
        return f"in {machine.dtype} the operator's own form gives no finite numbers here to compare it with"
    limit = max(LIMITS[machine.dtype], min(2 * own, MOST))
    return None if error <= limit else f"it is {error:.1e} off here, wanted at most {limit:.2g}"


@functools.lru_cache(maxsize=256)
def errors(
    operator: str, form: str, arguments: tuple[tuple[str, Value], ...], machine: Machine
) -> tuple[float, float]:
    """The relative error of a form against float64, and that of the operator's own form in the same dtype."""
    from graftc.operators.specs import SPECS

    return _errors(SPECS[operator], form, dict(arguments), machine)


def _errors(
    spec: OperatorSpec, form: str, arguments: Arguments, machine: Machine
) -> tuple[float, float]:
    """How far the kernel is from float64, and how far the own form in the same dtype."""
    from graftc.operators.build import build

    dtype = DTYPES[machine.dtype]
    given = dict(arguments)
    if "rotary" in given:  # it is done before the form begins, and wants more inputs
        given["rotary"] = "none"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        right = build(spec, {**given, "form": "auto"}).to(machine.device, torch.float64)
        made = [build(spec, {**given, "form": f}).to(machine.device, dtype) for f in (form, "auto")]
        for module in made:
            module.load_state_dict(right.state_dict())
        right.load_state_dict(made[0].state_dict())  # the same weights, as they were rounded
        x = torch.randn(2, TOKENS, int(str(given["dim"])), device=machine.device, dtype=dtype)
        wanted = _run(right, x.double())
        fast, own = (_apart(_run(module, x), wanted) for module in made)
    return fast, own


def _apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest relative error of all values; infinite where there is one that is no number."""
    errors = [
        float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
        for a, b in zip(found, wanted, strict=True)
    ]
    return max(e if e == e else float("inf") for e in errors)


def _run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of its mean square by x and by every weight."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *module.parameters()])]
