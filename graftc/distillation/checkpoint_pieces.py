"""A checkpoint that several processes write: each its rows of the tensors, in plain safetensors files.

torch.distributed.checkpoint is not used: its metadata is a pickle, and so is what its processes tell each
other. The pieces have a name of their own each time; the checkpoint that names them is replaced last, by rank
0, and then the old pieces go: at any moment one checkpoint is whole. Any number of processes can read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftc.diagnostics import fail
from graftc.distillation.checkpoint import load_facts, save_tensors
from graftc.distillation.pieces import Rows
from graftc.distillation.ranks import Ranks
from graftc.distillation.run import PIECE, Run


@dataclass(frozen=True)
class Saved:
    """A checkpoint, whoever wrote it: `tensors` that are whole, and where the rows of others are."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    places: Mapping[str, list[tuple[Path, Rows]]] = field(
        default_factory=dict[str, list[tuple[Path, Rows]]]
    )

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names that begin with it."""
        every = dict.fromkeys((*self.tensors, *self.places))
        return [name.removeprefix(prefix) for name in every if name.startswith(prefix)]

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A tensor, or rows of it. Raises GraftError (G551) where its files do not have them all."""
        if name in self.tensors:
            value = self.tensors[name]
            return value if rows is None else value[rows.start : rows.stop]
        places = self.places[name]
        total = places[0][1].total
        wanted = rows or Rows(0, total, total)
        parts: list[Tensor] = []
        at = wanted.start
        for path, has in sorted(places, key=lambda place: place[1].start):
            start, stop = max(at, has.start), min(wanted.stop, has.stop)
            if start == at and start < stop:
                parts.append(_rows(path, name, start - has.start, stop - has.start))
                at = stop
        if at < wanted.stop:
            fail("G551", f"the checkpoint lacks rows of `{name}`", site=str(places[0][0].parent),
                 wanted=f"{wanted.start} to {wanted.stop}", found=f"up to {at}",
                 help="start a new run")  # fmt: skip
        return torch.cat(parts)


def _rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[start:stop]
    except (OSError, SafetensorError) as error:
        fail("G551", f"cannot read `{path.name}`: {error}", site=str(path))


def save(
    run: Run,
    ranks: Ranks,
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, Rows],
    facts: Mapping[str, Any],
    step: int,
) -> None:
    """Replace the run's checkpoint; all processes call it. `rows`: which of `tensors` are pieces, and what part."""
    names = [f"{PIECE}{step:08d}-{r}-of-{ranks.size}.safetensors" for r in range(ranks.size)]
    if rows:
        own = {n: t for n, t in tensors.items() if n in rows}
        places = {n: [rows[n].start, rows[n].stop, rows[n].total] for n in own}
        save_tensors(run.path / names[ranks.rank], own, {"rows": places})
        ranks.barrier()
    whole = {n: t for n, t in tensors.items() if n not in rows}
    run.save(whole, {**facts, "pieces": names if rows else []})
    for old in _old(run, names if rows else []) if ranks.first else ():
        old.unlink(missing_ok=True)


def load(run: Run) -> Saved | None:
    """The run's checkpoint, or None. Raises GraftError (G551) where a piece cannot be read."""
    found = run.load()
    if found is None:
        return None
    tensors, facts = found
    places: dict[str, list[tuple[Path, Rows]]] = {}
    for name in facts.get("pieces", ()):
        path = run.path / name
        for tensor, row in load_facts(path)["rows"].items():
            places.setdefault(tensor, []).append((path, Rows(*row)))
    return Saved(facts, tensors, places)


def _old(run: Run, names: Sequence[str]) -> list[Path]:
    return [p for p in run.path.glob(f"{PIECE}*.safetensors") if p.name not in names]
