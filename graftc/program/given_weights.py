"""`--weights FILE|FOLDER`: a model's weights from safetensors or a state dict, one tensor at a time.

Each tensor is copied into the module's own memory and let go again, so that no second copy of the weights is
ever held, whatever the number of shards. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError, fail, nearest

SITE = "--weights"
_SHOWN = 8
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_KEYS = ("state_dict", "model", "module")
"""Under which training scripts hold a model's state dict in a checkpoint."""


def weight_files(where: Path) -> list[Path]:
    """The file, or the folder's shards: those that its index names, or all its safetensors.

    Raises GraftError: G800 for what is not there, G804 for an index that cannot be read.
    """
    if where.is_file():
        return [where] if not where.name.endswith(".index.json") else _indexed(where)
    if not where.is_dir():
        fail("G800", f"no such file or folder: {where}", site=SITE)
    indices = sorted(where.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        fail("G800", f"`{where}` holds {len(indices)} indices", site=SITE,
             found=", ".join(i.name for i in indices), help="give the one that is meant")  # fmt: skip
    if indices:
        return _indexed(indices[0])
    found = sorted(where.glob("*.safetensors")) or sorted(
        p for p in where.iterdir() if p.suffix in _TORCH
    )
    if not found:
        fail("G800", f"`{where}` holds no weights", site=SITE,
             wanted="*.safetensors, with or without *.safetensors.index.json",
             found=", ".join(sorted(p.name for p in where.iterdir())[:_SHOWN]) or "an empty folder")  # fmt: skip
    if found[0].suffix in _TORCH and len(found) > 1:
        fail("G800", f"`{where}` holds {len(found)} files, and nothing says which", site=SITE,
             found=", ".join(p.name for p in found[:_SHOWN]), help="give the file")  # fmt: skip
    return found


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail("G804", f"`{index.name}` is no index of shards: {error}", site=SITE)
    files = [index.parent / str(n) for n in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        fail("G800", f"`{index.name}` names {_listed(missing)}, which are not there", site=SITE)
    return files


def weights_hash(where: Path) -> str:
    """SHA-256 of the files' names and bytes.

    >>> weights_hash(Path(__file__)) == weights_hash(Path(__file__))
    True
    """
    digest = hashlib.sha256()
    for file in weight_files(where):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_weights(module: nn.Module, where: Path) -> None:
    """Give a module the weights of a file or folder, in place, in its own dtypes; shards one after the other.

    Every parameter and persistent buffer must be there, a tied one under one of its names, and nothing else.
    On the meta device names and shapes are checked and nothing is read. Raises GraftError: G800 nothing
    there, G801 missing, G802 left over, G803 another shape, G804 unreadable; where names or shapes do not
    fit, the module is as it was.
    """
    own = module.state_dict(keep_vars=True)
    files = weight_files(where)
    _check(own, {n: s for f in files for n, s in _shapes(f).items()}, where)
    if any(t.is_meta for t in own.values()):
        return
    with torch.no_grad():
        for file in files:
            for name, tensor in _tensors(file):
                own[name].copy_(tensor)


def _check(own: Mapping[str, Tensor], given: Mapping[str, tuple[int, ...]], where: Path) -> None:
    tied = {id(own[n]) for n in given if n in own}
    missing = [n for n, t in own.items() if n not in given and id(t) not in tied]
    extra = [n for n in given if n not in own]
    if missing:
        near = nearest(missing[0], extra)
        prefix = _prefix(missing[0], extra)
        fail("G801", f"`{where.name}` has no {_listed(missing)} of the model", site=SITE,
             found=_listed(extra) if extra else None,
             help=f"its names begin with `{prefix}`: build the model that holds this one, or rename them"
             if prefix else f"it has `{near}`: is it of this architecture and size?" if near
             else "is it of this architecture and size?")  # fmt: skip
    if extra:
        fail("G802", f"the model has no {_listed(extra)} of `{where.name}`", site=SITE,
             help="is it of this architecture and size?")  # fmt: skip
    for name, shape in given.items():
        if tuple(own[name].shape) != shape:
            fail("G803", f"`{name}` has another shape in `{where.name}`", site=SITE,
                 wanted=str(list(own[name].shape)), found=str(list(shape)))  # fmt: skip


def _prefix(name: str, given: list[str]) -> str:
    return next((g.removesuffix(name) for g in given if g != name and g.endswith(f".{name}")), "")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix in _TORCH:
        return {n: tuple(t.shape) for n, t in _state(file).items()}
    from safetensors import safe_open

    with _readable(file), safe_open(file, framework="pt") as opened:
        return {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file; the one before is let go, and with it its pages of the file."""
    if file.suffix in _TORCH:
        yield from _state(file).items()
        return
    from safetensors import safe_open

    for name in _shapes(file):
        with _readable(file), safe_open(file, framework="pt") as opened:
            yield name, opened.get_tensor(name)


def _state(file: Path) -> Mapping[str, Tensor]:
    """The state dict of a `torch.save` file, mapped from disk; on top, or under a usual key."""
    with _readable(file):
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for key in _KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):  # pyright: ignore[reportUnknownMemberType]
            found = found[key]  # pyright: ignore[reportUnknownVariableType]
            break
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):  # pyright: ignore[reportUnknownVariableType]
        fail("G804", f"`{file.name}` holds no state dict", site=SITE,
             wanted=f"names → tensors, on top or under {', '.join(_KEYS)}")  # fmt: skip
    return found  # pyright: ignore[reportUnknownVariableType]


@contextmanager
def _readable(file: Path) -> Generator[None]:
    """Errors of a library that reads a file as G804."""
    try:
        yield
    except GraftError:
        raise
    except Exception as error:  # each library has its own
        fail("G804", f"`{file.name}` {unreadable(file, error)}", site=SITE,
             wanted="safetensors, or a file of torch.save that holds tensors alone")  # fmt: skip


def unreadable(file: Path, error: Exception) -> str:
    """Why a library could not read a file of weights; what a pickle would have called, where that is why.

    torch's own words for it end in the advice to unpickle the file all the same.
    """
    if isinstance(error, pickle.UnpicklingError):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # not of this form of file, or broken
            names = []
        more = f": {', '.join(names[:_SHOWN])}" if names else ""
        return f"is no file of tensors alone, and was not unpickled{more}"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"cannot be read: {first}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
