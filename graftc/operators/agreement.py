"""Whether an installed kernel computes on the GPU at hand what the operator's own form does."""

from __future__ import annotations

import functools

import torch
from torch import nn

from graftc.operators.spec import Arguments, Form, Machine, OperatorSpec, Value

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2}
"""Relative error, of the output and of every gradient, up to which two forms agree."""
TOKENS = 200
"""More than a chunk of any form, and no multiple of one."""


def disagreement(
    spec: OperatorSpec, form: Form, arguments: Arguments, machine: Machine
) -> str | None:
    """None where the form agrees, forward and backward, else what was found; run on the device of `machine`.

    Both are compared with the operator's own form in float64 on the same device, so that the precision of the own
    form is not held against the kernel.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here to compare it on"
    return _found(spec.name, form.name, tuple(sorted(arguments.items())), machine)


@functools.lru_cache(maxsize=256)
def _found(
    operator: str, form: str, arguments: tuple[tuple[str, Value], ...], machine: Machine
) -> str | None:
    """One comparison for all sites that are alike."""
    from graftc.operators.specs import SPECS

    try:
        error = _error(SPECS[operator], form, dict(arguments), machine)
    except Exception as problem:  # whatever a package of another version raises
        return f"it does not run here: {(str(problem) or type(problem).__name__).splitlines()[0]}"
    limit = LIMITS[machine.dtype]
    return None if error <= limit else f"it is {error:.1e} off here, wanted at most {limit:g}"


def _error(spec: OperatorSpec, form: str, arguments: Arguments, machine: Machine) -> float:
    from graftc.operators.build import build

    dtype = DTYPES[machine.dtype]
    given = dict(arguments)
    if "rotary" in given:  # it is done before the form begins, and wants more inputs
        given["rotary"] = "none"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = build(spec, {**given, "form": "auto"}).to(machine.device, torch.float64)
        fast = build(spec, {**given, "form": form}).to(machine.device, dtype)
        fast.load_state_dict(own.state_dict())
        own.load_state_dict(fast.state_dict())  # the same weights, as they were rounded
        x = torch.randn(2, TOKENS, int(str(given["dim"])), device=machine.device, dtype=dtype)
        right, found = _run(own, x.double()), _run(fast, x)
    errors = [
        float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
        for a, b in zip(found, right, strict=True)
    ]
    return max(e if e == e else float("inf") for e in errors)


def _run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of its mean square by x and by every weight."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *module.parameters()])]
