"""The standalone package: a folder with `model.py`, `model.safetensors` and `config.yaml`."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import graftc.emit.files as files
from graftc.diagnostics import fail
from graftc.emit.dropout import with_dropout
from graftc.emit.source import source, without_folders
from graftc.program.dropout_rate import KEPT
from graftc.program.outline import original_name
from graftc.program.program import Program

FORMAT = 1
CONSTANTS = "constants.safetensors"
State = Mapping[str, torch.Tensor]
Weights = Literal["copy", "link"]

_imported = 0


def write_package(
    program: Program,
    directory: Path | str,
    *,
    provenance: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    weights: Weights = "copy",
    link: str = "",
    linked_weights: str = "",
    made_by: str = "",
) -> dict[str, Any]:
    """Write `program` into `directory` (not atomic: `write_build` and `export` see to that).

    `provenance`: module path → the comment at its place in `model.py`. `config`: entries to add to
    `config.yaml`. `weights="link"` writes no tensors but the SHA-256 of the state, and `link`, the
    MODEL reference that gives it again (with the tensors of `linked_weights`, where given). Returns what `config.yaml` holds. Raises GraftError for a
    program on the meta device whose weights are to be copied, or one that cannot be printed.
    """
    folder = Path(directory)
    provenance = {path: without_folders(text) for path, text in (provenance or {}).items()}
    _, dropouts = with_dropout(program)
    text = source(program, provenance=provenance, made_by=made_by)
    stored, ties = stored_state(program.root)
    if any(t.is_meta for t in stored.values()):
        fail("G620", "a model on the meta device has no weights to write", site=str(folder),
             help="load the model with its weights")  # fmt: skip
    entry: dict[str, Any] = {"sha256": files.state_hash(stored)}
    constants: State = {}
    if weights == "link":
        entry = {"model": link, **({"from": linked_weights} if linked_weights else {}), **entry}
        names = {n: original_name(program, n) for n in stored}
        if moved := {n: old for n, old in names.items() if n != old}:
            entry["names"] = moved  # what was outlined from a block's own forward
        constants = {n: t for n, t in stored.items() if n in outside_state(program.root)}
        if constants:  # a literal in forward, a fixed mask, a buffer outside of the state dict
            entry["constants"] = CONSTANTS
    else:
        entry = {"file": "model.safetensors", **entry}
    described = {
        "graftc_package": FORMAT,
        **describe(program),
        "weights": {**entry, "ties": ties},
        **({"dropout": list(dropouts)} if dropouts else {}),
        "provenance": provenance,
        "versions": versions(),
        **(config or {}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if weights == "copy":
            save_state(stored, folder / "model.safetensors")
        elif "constants" in entry:
            save_state(constants, folder / CONSTANTS)
        files.write_text(folder / "model.py", text)
        files.write_yaml(folder / "config.yaml", described)
    except OSError as error:
        files.cannot_write(error, folder)
    return described


def describe(program: Program) -> dict[str, Any]:
    """What a user of the model must know: its inputs, its outputs, what capture fixed."""
    facts = program.facts
    packages = {getattr(m, "needs", None) for m in program.root.modules()}
    needs = sorted(p for p in packages if isinstance(p, str))
    return {
        "model": program.classes.get("", "").rpartition(".")[2] or "Model",
        **({"needs_on_a_gpu": needs} if needs else {}),
        "inputs": [
            {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "meaning": p.meaning}
            for p in program.inputs
        ],
        "outputs": {"kind": program.outputs.kind, "names": list(program.outputs.names)},
        "facts": {
            "mode": facts.mode,
            "dtype": facts.dtype,
            "dynamic": dict(facts.dynamic),
            "absent": list(facts.absent),
            "constants": dict(facts.constants),
            "notes": list(facts.notes),
        },
    }


def versions() -> dict[str, str]:
    return {
        "graftc": _graftc_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _graftc_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("graftc")
    except PackageNotFoundError:
        return "unknown"


def stored_state(root: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors that make a model, each once, and the further names of those that are shared.

    Besides the state dict these are the buffers outside of it: without them no file could give the
    model again.
    """
    first: dict[int, str] = {}
    stored: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    state = root.state_dict(keep_vars=True)
    extra = {n: b for n, b in root.named_buffers(remove_duplicate=False) if n not in state}
    for name, tensor in {**state, **extra}.items():
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            stored[name] = tensor.detach()
    return stored, ties


def outside_state(root: nn.Module) -> frozenset[str]:
    """Names of the buffers that are in no state dict: what capture made, and what the model's maker left out."""
    names = {n for n, _ in root.named_buffers(remove_duplicate=False)}
    return frozenset(names - root.state_dict(keep_vars=True).keys())


def save_state(stored: State, path: Path) -> None:
    """Tensors as safetensors; views and shared storage are written out.

    Raises OSError, and GraftError (G817) for complex numbers of double precision, which the format lacks.
    """
    double = next((n for n, t in stored.items() if t.dtype is torch.complex128), None)
    if double is not None:
        fail("G817", f"`{double}` is complex128, which no safetensors file can hold", site=double,
             wanted="complex64, or real numbers", found="complex128",
             help="make it complex64, or a buffer outside of the state dict "
             "(`register_buffer(…, persistent = False)`), which is kept as real numbers")  # fmt: skip
    try:
        seen: set[int] = set()
        save_file({n: _whole(t.detach().cpu(), seen) for n, t in stored.items()}, path)
    except SafetensorError as error:  # a full disk comes in this shape
        raise OSError(errno.EIO, str(error), str(path)) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read


def _whole(tensor: torch.Tensor, seen: set[int]) -> torch.Tensor:
    """The tensor itself where a storage is its own, else a copy: a large model is not held twice."""
    storage = tensor.untyped_storage()
    own = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    if not own or storage.data_ptr() in seen:
        return tensor.contiguous().clone()
    seen.add(storage.data_ptr())
    return tensor


def load_package(
    directory: Path | str,
    weights: Path | str | None = None,
    *,
    state: State | Callable[[], State | nn.Module] | None = None,
) -> nn.Module:
    """The model of a package, with its own weights, then those of `weights` (a safetensors file).

    `state` gives the weights of a package that only links them: a state dict, a module, or a function
    that makes one; its hash must be the recorded one. Raises GraftError for a missing or damaged
    file, for weights that do not fit, and for linked weights that have changed.
    """
    folder = Path(directory)
    config = files.read_yaml(folder / "config.yaml")
    if config.get("graftc_package") != FORMAT:
        fail("G621", "this package was written by another version of graftc", site=str(folder),
             wanted=f"graftc_package: {FORMAT}", found=str(config.get("graftc_package")),
             help="write it again with this version")  # fmt: skip
    module = import_source(folder / "model.py")
    with torch.device("meta"):
        model: nn.Module = getattr(module, module.load.__annotations__["return"])()
    entry: dict[str, Any] = config["weights"]
    if "file" in entry:
        read_weights(module, model, folder / str(entry["file"]))
    else:
        _take_linked(model, entry, state, folder)
    if weights is not None:
        read_weights(module, model, Path(weights), part=True)
    for path in config.get("dropout", ()):
        setattr(model.get_submodule(path), KEPT, True)
    return model.train(config["facts"]["mode"] == "train")


def read_weights(module: ModuleType, model: nn.Module, path: Path, *, part: bool = False) -> None:
    """Load a safetensors file by the package's own `load_weights`, errors as diagnostics."""
    if not path.is_file():
        fail("G622", f"no such weights: {path.name}", site=str(path))
    try:
        module.load_weights(model, path, part=part)
    except (KeyError, ValueError, SafetensorError) as error:
        text = str(error.args[0]) if error.args else str(error)
        fail("G622", f"the weights do not fit the model: {text}", site=str(path))


def import_source(path: Path) -> ModuleType:
    """A Python file under a name of its own, so that two packages do not meet."""
    global _imported
    if not path.is_file():
        fail("G612", f"`{path.name}` is missing", site=str(path))
    _imported += 1
    name = f"graftc_package_{_imported}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling, dataclasses and dynamo look a class's module up
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def _take_linked(model: nn.Module, entry: Mapping[str, Any], state: Any, folder: Path) -> None:
    if state is None:
        fail("G623", "the weights are not in this package, only their hash", site=str(folder),
             wanted=f"the weights that `{entry.get('model')}` makes",
             help="give MODEL again, or compile with --copy-teacher")  # fmt: skip
    made: Any = state() if callable(state) and not isinstance(state, nn.Module) else state
    given: Mapping[str, torch.Tensor]
    if isinstance(made, nn.Module):
        buffers = dict(made.named_buffers(remove_duplicate=False))
        given = {**buffers, **made.state_dict(keep_vars=True)}
    else:
        given = made
    stored, ties = stored_state(model)
    moved: Mapping[str, str] = entry.get("names", {})
    names = {n: moved.get(n, n) for n in stored}
    if "constants" in entry:
        given = {**given, **_read_constants(folder / str(entry["constants"]))}
    missing = [old for old in names.values() if old not in given]
    found = "" if missing else files.state_hash({n: given[old] for n, old in names.items()})
    if found != entry["sha256"]:
        fail("G624", "the linked weights have changed since this build", site=str(folder),
             wanted=f"sha256 {entry['sha256'][:16]}…",
             found=f"no `{missing[0]}`" if missing else f"sha256 {found[:16]}…",
             help=f"restore what `{entry.get('model')}` gave, or compile again")  # fmt: skip
    _assign(model, {n: given[old] for n, old in names.items()}, ties)


def _read_constants(path: Path) -> State:
    if not path.is_file():
        fail("G622", f"no such weights: {path.name}", site=str(path))
    try:
        return load_file(path)
    except SafetensorError as error:
        fail("G622", f"the constants cannot be read: {error}", site=str(path))


def _assign(model: nn.Module, tensors: State, ties: Mapping[str, str]) -> None:
    """Put copies of tensors in a model on the meta device, shared ones as one."""
    fresh: dict[str, torch.Tensor] = {}
    for name in [*tensors, *ties]:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        learned = leaf in holder._parameters
        held: dict[str, Any] = holder._parameters if learned else holder._buffers
        first = ties.get(name, name)
        if first not in fresh:
            value = tensors[first].detach().clone()
            fresh[first] = nn.Parameter(value, held[leaf].requires_grad) if learned else value
        held[leaf] = fresh[first]
