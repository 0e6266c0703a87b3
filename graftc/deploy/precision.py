"""Half precision: which regions may be computed in it, found by trying them on real inputs."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graftc.deploy.regions import WHOLE, Region, watched
from graftc.deploy.runtimes import TOLERANCE, Precision
from graftc.diagnostics import fail
from graftc.emit.examples import tensors_of
from graftc.emit.verify import compare

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MARGIN = 0.8
"""The share of the tolerance that may be used up on the inputs that islands are chosen by."""
_HELPS = 0.9
"""An island is kept if it takes a tenth of the error away."""


@dataclass(frozen=True)
class Choice:
    """The regions that stay in float32, why each does, and the error that is left (relative L2)."""

    islands: Mapping[str, str]
    error: float
    errors: Mapping[str, float]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def one(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    return pytree.tree_map(one, value)


def lowered(model: nn.Module, precision: Precision, islands: Sequence[str] = ()) -> nn.Module:
    """A copy of `model` in a precision, float32 on the outside: its inputs and outputs keep their types.

    `islands`: paths of modules that are computed in float32 all the same.
    """
    made = copy.deepcopy(model)
    lower(made, precision, islands)
    return made


def lower(model: nn.Module, precision: Precision, islands: Sequence[str] = ()) -> None:
    """The same in place: no second copy of the weights in float32."""
    if precision == "fp32":
        return
    half = DTYPES[precision]
    kept = [model.get_submodule(p) for p in islands]
    held = {
        id(t) for m in kept for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()
    }  # fmt: skip
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and id(tensor) not in held:
                    value = tensor.detach().to(half)
                    tensors[name] = cast(
                        "Any",
                        nn.Parameter(value, False) if tensors is module._parameters else value,
                    )
    for module in kept:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (_cast(args, torch.float32), _cast(kwargs, torch.float32)), with_kwargs=True
        )  # fmt: skip
        module.register_forward_hook(lambda _, __, output: _cast(output, half))
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (_cast(args, half), _cast(kwargs, half)), with_kwargs=True
    )
    model.register_forward_hook(lambda _, __, output: _cast(output, torch.float32))


def choose_islands(
    model: nn.Module,
    precision: Precision,
    regions: Sequence[Region],
    inputs: Mapping[str, Tensor],
    declared: Mapping[str, str],
) -> Choice:
    """The float32 islands: those that operators declare, then the regions that are furthest off, until it fits.

    A region's error is its own: it is given float32's inputs. Raises GraftError where the values between
    regions (the residual stream) are more than the type holds: no island helps there.
    """
    if precision == "fp32":
        return Choice({}, 0.0, {})
    limit = TOLERANCE[precision]
    with torch.no_grad(), watched(model, [r.path for r in regions]) as seen:
        wanted = tensors_of(model(**inputs))
    most = float(torch.finfo(DTYPES[precision]).max)
    for path, tensors in seen.items():
        largest = max(float(t.abs().max()) for t in tensors)
        if not largest <= most:
            fail("G665", f"values reach {largest:.3g} at `{path}`: {precision} holds {most:.3g}", site="--precision",
                 found=precision, help="--precision bf16, which has float32's range")  # fmt: skip
    inner = [
        r.path for r in regions if r.path in seen and r.path != WHOLE and not _is_block(r.path)
    ]
    errors = _own_errors(model, precision, inner, inputs)
    islands = {p: why for p, why in declared.items() if p}
    queue = [p for p in sorted(inner, key=lambda p: -_rank(errors.get(p, 0.0))) if p not in islands]
    for path in [p for p in queue if not errors[p] < float("inf")]:
        islands[path] = f"overflows in {precision}"
    queue = [p for p in queue if p not in islands]
    error = _error(model, precision, list(islands), inputs, wanted)
    step = 1
    while error > _MARGIN * limit and queue:
        tried, queue, step = queue[:step], queue[step:], 2 * step
        less = _error(model, precision, [*islands, *tried], inputs, wanted)
        if less > _HELPS * error:
            continue  # float32 there would cost time and change nothing
        for path in tried:
            islands[path] = f"{errors[path]:.1e} off on its own; the output was {error:.1e} off"
        error = less
    if not error <= limit:
        fail("G665", f"the model is {error:.1e} off in {precision}, with every region in float32 that can be",
             site="--precision", wanted=f"{limit:.0e} relative L2",
             help="--precision bf16" if precision == "fp16" else "--precision fp32")  # fmt: skip
    return Choice(islands, error, errors)


def _is_block(path: str) -> bool:
    return path.rpartition(".")[2].isdecimal()


def _rank(error: float) -> float:
    return float("inf") if error != error else error


def _error(
    model: nn.Module,
    precision: Precision,
    islands: Sequence[str],
    inputs: Mapping[str, Tensor],
    wanted: list[Tensor],
) -> float:
    with torch.no_grad():
        found = tensors_of(lowered(model, precision, islands)(**inputs))
    norm = compare(wanted, found).norm
    return norm if norm == norm else float("inf")


def _own_errors(
    model: nn.Module, precision: Precision, paths: Sequence[str], inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """Each region in half on float32's own inputs: relative L2 of what it returns."""
    half = DTYPES[precision]
    found: dict[str, float] = {}
    with _recorded(model, paths) as calls, torch.no_grad():
        model(**inputs)
    for path, (args, kwargs, output) in calls.items():
        module = copy.deepcopy(model.get_submodule(path)).to(half)
        try:
            with torch.no_grad():
                got = tensors_of(module(*_cast(args, half), **_cast(kwargs, half)))
        except RuntimeError:  # an op without a half kernel on this device
            found[path] = float("inf")
            continue
        norm = compare(tensors_of(output), got).norm
        found[path] = norm if norm == norm else float("inf")
    return found


@contextmanager
def _recorded(model: nn.Module, paths: Sequence[str]) -> Generator[dict[str, tuple[Any, Any, Any]]]:
    calls: dict[str, tuple[Any, Any, Any]] = {}
    hooks: list[Any] = []

    def record(path: str) -> Any:
        def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(path, (args, kwargs, output))

        return see

    for path in paths:
        hooks.append(
            model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True)
        )
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
