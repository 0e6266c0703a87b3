"""Files that are whole or not there: atomic directories, YAML, hashes of weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from torch import nn

from graftc.diagnostics import fail

_PARTIAL = ".graftc-partial-"
_OLD = ".graftc-old-"


def state_hash(state: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and bytes, in the order of the names.

    >>> a = {"w": torch.ones(2), "b": torch.zeros(1)}
    >>> state_hash(a) == state_hash(dict(reversed(a.items())))
    True
    >>> state_hash(a) == state_hash({**a, "w": torch.ones(2).double()})
    False
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0"
        digest.update(head.encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        if flat.numel():
            bytes_: Any = flat.view(torch.uint8).numpy()
            digest.update(memoryview(bytes_))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_directory(target: Path, *, ours: Callable[[Path], bool]) -> Generator[Path]:
    """An empty folder to fill, which becomes `target` when the block ends without an error.

    Until then an old `target` stays as it is; what a killed run left beside it is cleared. `ours` says
    whether an existing folder may be replaced. Raises GraftError if it may not, or the disk is full.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not ours(target))):
        fail("G610", "the output directory holds something else", site=str(target),
             wanted="a new or empty directory, or one that graftc wrote before",
             help="name another directory, or remove this one yourself")  # fmt: skip
    target = target.absolute()
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{target.name}-", dir=target.parent))
        partial.chmod(0o755)
        yield partial
        _sync_tree(partial)
        _swap(partial, target)
    except OSError as error:
        cannot_write(error, target)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Generator[Path]:
    """A path to write to, which becomes `target` when the block ends without an error."""
    target = target.absolute()
    partial = target.parent / f"{_PARTIAL}{os.getpid()}-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)
    except OSError as error:
        cannot_write(error, target)
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(error: OSError, target: Path) -> NoReturn:
    """Raise the GraftError for a write that the system refused."""
    fail("G611", f"cannot write: {error.strerror or error}", site=str(target),
         help="what was there before is unchanged; make room, or write elsewhere")  # fmt: skip


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """A mapping as YAML, keys in the order given; whole or not at all."""
    write_text(path, yaml.safe_dump(plain(data), sort_keys=False, allow_unicode=True, width=100))


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises GraftError where it cannot be written."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises GraftError if it is missing or is no mapping."""
    if not path.is_file():
        fail("G612", f"`{path.name}` is missing", site=str(path), help="write the build again")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail("G612", f"`{path.name}` cannot be read: {str(error).splitlines()[0]}", site=str(path))
    if not isinstance(data, dict):
        fail("G612", f"`{path.name}` holds no mapping", site=str(path))
    return cast("dict[str, Any]", data)


def plain(data: Any) -> Any:
    """The same data in YAML's own types: tuples as lists, paths and dtypes as text."""
    if isinstance(data, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", data).items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        items: list[Any] = list(cast("list[Any]", data))
        return [plain(v) for v in items]
    if data is None or isinstance(data, (bool, int, float)):
        return data
    return str(data) if isinstance(data, str) else str(data).removeprefix("torch.")


def _clear_leftovers(target: Path) -> None:
    """What a killed run left; if it was killed between the two renames, the old folder is put back."""
    for left in target.parent.glob(f"{_OLD}{target.name}-*"):
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)
    for left in target.parent.glob(f"{_PARTIAL}{target.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _swap(partial: Path, target: Path) -> None:
    """Rename into place; the old folder goes only when the new one stands."""
    if not target.exists():
        partial.rename(target)
        _sync(target.parent)
        return
    old = target.parent / partial.name.replace(_PARTIAL, _OLD)
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
