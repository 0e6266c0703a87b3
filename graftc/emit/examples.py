"""Example inputs for a package: seeded, of the right dtypes, with indices that its tables hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Inputs = Callable[[int, torch.Generator], Mapping[str, Tensor]]
"""Named inputs for a batch size; the generator is on the CPU."""


def example_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Dynamic dimension → the size it had at capture (2 at least: export fixes a size of 1)."""
    return {k: max(2, int(v)) for k, v in config["facts"]["dynamic"].items()}


def random_inputs(config: Mapping[str, Any], model: nn.Module) -> Inputs:
    """Random inputs: normal numbers; for masks ones and zeros; for indices what the tables hold.

    Only a stand-in for real data: `Task.prepare` gives what the model was trained on.
    """
    limits = index_limits(config, model)

    def make(batch: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        sizes = {**example_sizes(config), "batch": batch}
        return {i["name"]: _draw(i, sizes, limits, generator) for i in config["inputs"]}

    return make


def _draw(
    port: Mapping[str, Any],
    sizes: Mapping[str, int],
    limits: Mapping[str, int],
    generator: torch.Generator,
) -> Tensor:
    shape = [sizes[s] if isinstance(s, str) else int(s) for s in port["shape"]]
    dtype = getattr(torch, port["dtype"])
    name, meaning = str(port["name"]), str(port["meaning"])
    if "mask" in meaning or (meaning == "other" and "mask" in name):
        mask = torch.randint(0, 2, shape, generator=generator)
        mask[..., 0] = 1  # a row that sees nothing is no input of a real model
        return mask.to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    if dtype.is_floating_point:
        if meaning == "timestep":
            return 1000 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, limits.get(name, 2), shape, generator=generator, dtype=dtype)


def index_limits(config: Mapping[str, Any], model: nn.Module) -> dict[str, int]:
    """Integer input → how many values it can take: the rows of the table it is looked up in, else 1,000."""
    sizes = example_sizes(config)
    wanted = {str(i["name"]) for i in config["inputs"] if _is_index(i)}
    zeros: dict[str, Tensor] = {}
    for port in config["inputs"]:
        shape = [sizes[s] if isinstance(s, str) else int(s) for s in port["shape"]]
        zeros[str(port["name"])] = torch.zeros(shape, dtype=getattr(torch, port["dtype"]))
    found = dict.fromkeys(wanted, 1000)
    place = {zeros[n].data_ptr(): n for n in wanted}
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if device.type == "cpu":
        with torch.no_grad(), _Tables(place, found):
            model(**zeros)
    return found


class _Tables(TorchFunctionMode):
    """Sees how many rows each table has that an input is looked up in, whichever module does it."""

    def __init__(self, place: Mapping[int, str], found: dict[str, int]) -> None:
        super().__init__()
        self.place, self.found = place, found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (functional.embedding, torch.embedding):
            first, second = (*args, given.get("input"), given.get("weight"))[:2]
            index, table = (second, first) if func is torch.embedding else (first, second)
            name = self.place.get(index.data_ptr()) if isinstance(index, Tensor) else None
            if name is not None and isinstance(table, Tensor):
                self.found[name] = min(self.found[name], table.shape[0])
        return func(*args, **given)


def _is_index(port: Mapping[str, Any]) -> bool:
    dtype = getattr(torch, port["dtype"])
    return not dtype.is_floating_point and dtype != torch.bool


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors that a model returned, in order.

    >>> tensors_of((torch.ones(1), [torch.zeros(1)]))
    [tensor([1.]), tensor([0.])]
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [t for v in cast("Mapping[str, Any]", outputs).values() for t in tensors_of(v)]
    if isinstance(outputs, (tuple, list)):
        return [t for v in cast("list[Any]", outputs) for t in tensors_of(v)]
    return []
