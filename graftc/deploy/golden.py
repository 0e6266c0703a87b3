"""Golden files: inputs as the Task draws them from DATA, and what the student answers, at every corner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from graftc.deploy.regions import Region, watched
from graftc.deploy.request import Request
from graftc.emit.examples import Inputs, example_sizes, random_inputs, tensors_of

_SEED = 20250605
_USUAL = 3
"""Draws at the usual shape: several timesteps even where the batch is one."""
_REGIONS_LIMIT = 256 * 2**20
"""Bytes of region outputs that are kept for `verify --regions`."""


@dataclass(frozen=True)
class Source:
    """Where golden inputs come from: the Task's (`drawn`), or random numbers of the right kind."""

    draw: Callable[[Mapping[str, int], int], dict[str, Tensor]]
    drawn: bool


def source(config: Mapping[str, Any], model: nn.Module, task_inputs: Inputs | None) -> Source:
    """Inputs for given sizes and a seed. The batch is drawn; other sizes are cut from the drawn, or it is repeated."""
    make = task_inputs or random_inputs(config, model)
    ports = {str(p["name"]): p for p in config["inputs"]}
    captured = example_sizes(config)

    def draw(sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(_SEED + seed)
        batch = sizes.get("batch", captured.get("batch") or _fixed_batch(config))
        given = {k: v for k, v in make(batch, generator).items() if k in ports}
        fitted = {n: _fit(t, ports[n]["shape"], sizes) for n, t in given.items()}
        dtypes = {n: getattr(torch, str(ports[n]["dtype"])) for n in fitted}
        return {n: t.to(dtypes[n]) for n, t in fitted.items()}

    return Source(draw, task_inputs is not None)


def _fixed_batch(config: Mapping[str, Any]) -> int:
    first = next((p["shape"][0] for p in config["inputs"] if p["shape"]), 1)
    return int(first) if not isinstance(first, str) else 2


def _fit(tensor: Tensor, shape: Sequence[int | str], sizes: Mapping[str, int]) -> Tensor:
    for axis, size in enumerate(shape):
        wanted = sizes.get(size) if isinstance(size, str) else None
        if wanted is not None and tensor.shape[axis] != wanted:
            index = torch.arange(wanted) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor


@dataclass(frozen=True)
class Case:
    """One golden case: its name and sizes; the files are `golden/NAME/…`."""

    name: str
    sizes: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    regions: bool
    timesteps: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "sizes": dict(self.sizes), "inputs": list(self.inputs), "outputs": list(self.outputs),
            "regions": self.regions, "timesteps": list(self.timesteps),
        }  # fmt: skip


def write_golden(
    folder: Path,
    model: nn.Module,
    request: Request,
    config: Mapping[str, Any],
    regions: Sequence[Region],
    output_names: Sequence[str],
    given: Source,
) -> list[Case]:
    """Write the cases of a request: npz, and raw little-endian files as `trtexec` reads and writes them (`NAME.bin`,
    an output `NAME.out.bin`)."""
    cases: list[Case] = []
    for name, sizes in request.corners():
        draws = _USUAL if name == "usual" else 1
        for i in range(draws):
            label = f"{name}-{i}" if draws > 1 else name
            inputs = given.draw(sizes, len(cases))
            keep = i == 0 and name == "usual"
            with torch.no_grad(), watched(model, [r.path for r in regions] if keep else []) as seen:
                outputs = tensors_of(model(**inputs))
            _write(folder / label, inputs, dict(zip(output_names, outputs, strict=True)))
            kept = keep and _write_regions(folder / label, seen)
            cases.append(
                Case(
                    label,
                    sizes,
                    tuple(inputs),
                    tuple(output_names),
                    kept,
                    _timesteps(config, inputs),
                )
            )
    return cases


def _write(folder: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    for kind, tensors in (("inputs", inputs), ("outputs", outputs)):
        arrays = {n: t.detach().cpu().contiguous().numpy() for n, t in tensors.items()}
        numpy.savez(folder / f"{kind}.npz", allow_pickle=False, **arrays)
        for name, array in arrays.items():
            array.tofile(folder / (f"{name}.bin" if kind == "inputs" else f"{name}.out.bin"))


def _write_regions(folder: Path, seen: Mapping[str, list[Tensor]]) -> bool:
    if sum(t.numel() * 4 for ts in seen.values() for t in ts) > _REGIONS_LIMIT:
        return False
    arrays = {
        f"{p}#{i}": t.detach().float().cpu().numpy()
        for p, ts in seen.items()
        for i, t in enumerate(ts)
    }
    numpy.savez(folder / "regions.npz", allow_pickle=False, **arrays)
    return True


def _timesteps(config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> tuple[float, ...]:
    found = [str(p["name"]) for p in config["inputs"] if p["meaning"] == "timestep"]
    if not found:
        found = [n for n in inputs if n in ("t", "timestep", "timesteps", "sigma")]
    return tuple(float(v) for n in found[:1] for v in inputs[n].reshape(-1).tolist())
