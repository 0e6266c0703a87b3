"""Measures on disk, by the content of what they were made from: a stale one has another name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftc.diagnostics import fail
from graftc.emit.files import state_hash, whole_file
from graftc.program.program import Program, structure_hash

DEFINITION = 1
"""Raised whenever a measure's definition, or the way that samples are drawn, changes."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/graftc/measures`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "graftc" / "measures"


def content_key(
    program: Program,
    inputs: Iterable[Mapping[str, Tensor]],
    families: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """Family → a hash of all that its measures follow from.

    That is: the captured graphs, the weights, the model's inputs (which DATA, the Task, the seed and the number of
    samples made), the sites that are measured, and the version of the definition.
    """
    given = hashlib.sha256()
    for batch in inputs:
        given.update(state_hash(batch).encode())
    model = f"{structure_hash(program.root)} {state_hash(_values(program))}"
    return {
        family: hashlib.sha256(
            json.dumps([DEFINITION, family, list(sites), model, given.hexdigest()]).encode()
        ).hexdigest()
        for family, sites in families.items()
    }


def _values(program: Program) -> dict[str, Tensor]:
    """Every parameter and buffer, those that are not in the state dict too."""
    root = program.root
    return {**dict(root.named_parameters()), **dict(root.named_buffers())}


def read(folder: Path, family: str, key: str) -> dict[str, Tensor] | None:
    """The values of a family, None where they are not there. Raises GraftError (G491) for a file that is no such."""
    path = _path(folder, family, key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            reason = "it was made from something else"
    except (SafetensorError, OSError) as error:
        reason = str(error)
    fail("G491", f"kept measures cannot be read: {reason}", site=str(path),
         help="they are measured again and the file is replaced")  # fmt: skip


def write(folder: Path, family: str, key: str, values: Mapping[str, Tensor], said: str) -> None:
    """Keep the values of a family; whole or not at all. `said`: on what they were measured, for a reader."""
    path = _path(folder, family, key)
    with whole_file(path) as partial:
        metadata = {"key": key, "definition": str(DEFINITION), "measured_on": said}
        save_file({n: v.contiguous() for n, v in values.items()}, partial, metadata=metadata)


def _path(folder: Path, family: str, key: str) -> Path:
    return folder / f"{family}-{key[:32]}.safetensors"
