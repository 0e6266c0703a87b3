"""How the original's modules are called: their arguments and results in Python, beside the captured graph.

A captured graph gives a module the tensors that it uses; the original's code gives it arguments by
name, some of them None, and takes back a tensor or a tuple. `recorded` runs the original once on
fake tensors (no memory, no arithmetic) and writes that down.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graftc.program.fixed import values_known
from graftc.program.kept import buffers_without_values
from graftc.program.model import Model

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Leaf:
    """A tensor in a call: `hidden_states`, `position_embeddings[0]`; its shape and dtype."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class CallRecord:
    """One call of a module. `outputs`: the leaves of its result; `kind`: 'tensor', 'tuple' or a class's name."""

    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    kind: str
    length: int


def recorded(model: Model, paths: Iterable[str]) -> dict[str, CallRecord]:
    """The first call of each module at `paths` ('' is the model itself).

    Raises whatever the original raises on fake tensors.

    >>> layer = nn.Sequential(nn.Linear(4, 4))
    >>> recorded(Model(layer, {"input": torch.zeros(2, 4)}), ["0"])["0"].inputs
    (Leaf(name='input', shape=(2, 4), dtype='float32'),)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, CallRecord] = {}
    handles: list[Any] = []

    def hook(path: str, module: nn.Module) -> Any:
        names = argument_names(module)

        def note(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if path not in found:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                found[path] = CallRecord(
                    _leaves(given), _leaves({"": result}), _kind(result), _length(result)
                )

        return module.register_forward_hook(note, with_kwargs=True)

    try:
        for path in paths:
            module = model.module.get_submodule(path)
            handles.append(hook(path, module))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, dict(model.inputs))
            known = values_known(model.module, {n: model.inputs[n] for n in model.fixed})
            with buffers_without_values(model.module, mode), known:
                model.module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The positional parameters of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def _leaves(given: Mapping[str, Any]) -> tuple[Leaf, ...]:
    return tuple(
        Leaf(name, tuple(int(s) for s in t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in tensors_in(given)
    )


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested tuples, lists and mappings, by name; other objects (a cache) hold none.

    >>> [n for n, _ in tensors_in({"a": torch.zeros(1), "b": (None, torch.zeros(1))})]
    ['a', 'b[1]']
    """
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors_in(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from tensors_in(inner, f"{name}[{index}]")


def _kind(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return "tensor"
    if type(result) in (tuple, list):
        return "tuple"
    return f"{type(result).__module__}.{type(result).__qualname__}"


def _length(result: Any) -> int:
    return len(result) if isinstance(result, (tuple, list)) else 1
