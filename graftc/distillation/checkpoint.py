"""Files that are whole or absent: a checkpoint is one safetensors file, its facts in the header."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftc.diagnostics import Note, fail

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready facts to `path` in one atomic rename.

    Raises GraftError (G550) where the disk is full or cannot be written; what was at `path`
    before is then untouched.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> save_tensors(path, {"w": torch.ones(2)}, {"step": 3})
    >>> tensors, facts = load_tensors(path)
    >>> tensors["w"].tolist(), facts
    ([1.0, 1.0], {'step': 3})
    """
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as any file is made here; safetensors makes it for its owner alone
        save_file(_own(tensors), temporary, metadata={"graftc": json.dumps(facts)})
        temporary.chmod(mode)
        _install(temporary, path)
    except (OSError, SafetensorError) as error:
        _refuse(path, temporary, error)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises GraftError (G551) where the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {}).get("graftc", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        fail("G551", f"cannot read `{path.name}`: {error}", site=str(path))
    return tensors, facts


def load_facts(path: Path) -> dict[str, Any]:
    """The facts of such a file, without its tensors. Raises GraftError (G551) where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("graftc", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        fail("G551", f"cannot read `{path.name}`: {error}", site=str(path))


def save_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write a YAML file in one atomic rename; errors as `save_tensors`."""
    temporary = _temporary(path)
    try:
        text = yaml.safe_dump(dict(data), sort_keys=False, width=100, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")
        _install(temporary, path)
    except OSError as error:
        _refuse(path, temporary, error)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises GraftError (G551) where there is none."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail("G551", f"cannot read `{path.name}`: {error}", site=str(path))
    if not isinstance(data, dict):
        fail("G551", f"`{path.name}` is no table", site=str(path), found=type(data).__name__)
    return cast(dict[str, Any], data)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, a shared storage copied: safetensors refuses to alias."""
    seen: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        made[name] = value
    return made


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing-{os.getpid()}")


def _install(temporary: Path, path: Path) -> None:
    """Flush, then rename: after a power cut the old file or the new one is there, never half."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _refuse(path: Path, temporary: Path, error: Exception) -> NoReturn:
    temporary.unlink(missing_ok=True)
    for left in path.parent.glob(".tmp*"):  # safetensors' own half-written file
        left.unlink(missing_ok=True)
    number = getattr(error, "errno", None)
    if number is None:
        told = re.search(r"os error (\d+)", str(error))
        number = int(told.group(1)) if told else None
    kept = (Note("the last checkpoint is whole: continue with `--resume` once there is room"),)
    if number in _FULL:
        fail("G550", f"no room left to write `{path.name}`", site=str(path), found=str(error),
             notes=kept if path.exists() else (), help="free some space, then resume")  # fmt: skip
    fail("G550", f"cannot write `{path.name}`: {error}", site=str(path),
         notes=kept if path.exists() else ())  # fmt: skip
