"""Half precision: which regions may be computed in it, found by trying them on real inputs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graftc.deploy.regions import WHOLE, Region
from graftc.deploy.runtimes import TOLERANCE, Precision
from graftc.deploy.shapes import first_line, own_lines
from graftc.diagnostics import Note, fail
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


class _Narrow(TorchFunctionMode):
    """Weights are cast as an operation takes them: one at a time, and none is kept."""

    def __init__(self, weights: frozenset[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights, self.dtype = weights, dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def one(value: Any) -> Any:
            mine = isinstance(value, Tensor) and id(value) in self.weights
            return value.detach().to(self.dtype) if mine else value

        positional: Any = pytree.tree_map(one, args)
        named: dict[str, Any] = pytree.tree_map(one, dict(kwargs or {}))
        return func(*positional, **named)


@contextmanager
def narrowed(
    model: nn.Module, precision: Precision, islands: Sequence[str] = ()
) -> Generator[None]:
    """Within the block, `model` computes as `lower` would leave it, and its weights stay as they are."""
    if precision == "fp32":
        yield
        return
    islands_of = [model.get_submodule(p) for p in islands]
    hooks = _casts(model, islands_of, DTYPES[precision])
    try:
        with _Narrow(_weights(model) - _held(islands_of), DTYPES[precision]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def lower(model: nn.Module, precision: Precision, islands: Sequence[str] = ()) -> None:
    """Put `model` in a precision, float32 on the outside: its inputs and outputs keep their types.

    In place, a weight at a time. `islands`: paths of modules that are computed in float32 all the same.
    """
    if precision == "fp32":
        return
    half = DTYPES[precision]
    kept = [model.get_submodule(p) for p in islands]
    held = _held(kept)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and id(tensor) not in held:
                    value = tensor.detach().to(half)
                    tensors[name] = cast(
                        "Any",
                        nn.Parameter(value, False) if tensors is module._parameters else value,
                    )
    _casts(model, kept, half)


def _weights(model: nn.Module) -> frozenset[int]:
    tensors = (*model.parameters(), *model.buffers())
    return frozenset(id(t) for t in tensors if t.is_floating_point())


def _held(modules: Sequence[nn.Module]) -> frozenset[int]:
    return frozenset().union(*(_weights(m) for m in modules))


def _casts(model: nn.Module, islands: Sequence[nn.Module], half: torch.dtype) -> list[Any]:
    """Hooks that cast what goes into islands and out of them, and into the model and out of it."""
    pairs = [(m, torch.float32, half) for m in islands] + [(model, half, torch.float32)]
    hooks: list[Any] = []
    for module, into, out in pairs:
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, d=into: (_cast(args, d), _cast(kwargs, d)), with_kwargs=True
            )
        )
        hooks.append(module.register_forward_hook(lambda _, __, output, d=out: _cast(output, d)))
    return hooks


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
    seen = _Observed(precision)
    with torch.no_grad(), seen.watching(model, regions):
        wanted = tensors_of(model(**inputs))
    most = float(torch.finfo(DTYPES[precision]).max)
    for path, largest in seen.largest.items():
        if not largest <= most:
            fail("G665", f"values reach {largest:.3g} at `{path}`: {precision} holds {most:.3g}", site="--precision",
                 found=precision, help="--precision bf16, which has float32's range")  # fmt: skip
    inner, errors = list(seen.errors), seen.errors
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
    try:
        with torch.no_grad(), narrowed(model, precision, islands):
            found = tensors_of(model(**inputs))
    except RuntimeError as error:  # most often a float32 value made from constants meets a half one
        fail("G672", f"the model does not run in {precision}: {first_line(error)}", site="--precision",
             found=precision, notes=[Note(line) for line in own_lines(error)], help="--precision fp32")  # fmt: skip
    norm = compare(wanted, found).norm
    return norm if norm == norm else float("inf")


@dataclass
class _Observed:
    """What a forward pass shows of each region as it returns: its largest value, and its own error in a half type.

    The region runs a second time, narrowed, on what float32 gave it; so nothing needs to be kept.
    """

    precision: Precision
    largest: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    busy: bool = False

    @contextmanager
    def watching(self, model: nn.Module, regions: Sequence[Region]) -> Generator[None]:
        hooks: list[Any] = []
        for region in regions:
            try:
                module = model.get_submodule(region.path)
            except AttributeError:
                continue
            hooks.append(module.register_forward_hook(self._hook(region.path), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found = [t for t in tensors_of(output) if t.is_floating_point()]
            if self.busy or not found or path in self.largest:
                return
            self.largest[path] = max(float(t.abs().max()) for t in found)
            if path != WHOLE and not _is_block(path):
                self.busy = True
                try:
                    self.errors[path] = self._error(module, args, kwargs, found)
                finally:
                    self.busy = False

        return see

    def _error(self, module: nn.Module, args: Any, kwargs: Any, wanted: list[Tensor]) -> float:
        half = DTYPES[self.precision]
        try:
            with _Narrow(_weights(module), half):
                output = module(*_cast(args, half), **_cast(kwargs, half))
        except RuntimeError:  # an op without a half kernel on this device
            return float("inf")
        norm = compare(wanted, [t for t in tensors_of(output) if t.is_floating_point()]).norm
        return norm if norm == norm else float("inf")
