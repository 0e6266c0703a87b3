"""`model.pt2`: a program that `torch.export.save` wrote, as a model.

`torch.export.load` gives the file's graphs back by way of torch's own reader, which may run code that a crafted
file holds: naming a file on the command line trusts it, as naming a Python file does. What would need unpickling
(weights of unusual layouts, objects of custom classes, sample inputs other than tensors) is refused before the reader sees the file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
import logging
import re
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.unflatten import UnflattenedModule
from torch.utils import _pytree as pytree

from graftc.diagnostics import fail
from graftc.program.model import Model

SUFFIX = ".pt2"


class Saved(UnflattenedModule):
    """The tree of a saved program, called by the names of its inputs. `exported` needs no tracing again."""

    exported: torch.export.ExportedProgram


def _tree(exported: torch.export.ExportedProgram, names: tuple[str, ...], positional: int) -> Saved:
    """The program as modules that hold its own tensors, with a forward that takes inputs by name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        first = [given.pop(n) for n in names[:positional]]
        return UnflattenedModule.forward(self, *first, **given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind) for n in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module = torch.export.unflatten(exported)
    tied: dict[Any, Tensor] = {}
    for name, tensor in exported.state_dict.items():  # unflatten copies every one
        path, _, leaf = name.rpartition(".")
        holder = module.get_submodule(path)
        held: dict[str, Any] = holder._parameters if leaf in holder._parameters else holder._buffers
        place = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        held[leaf] = tied.setdefault(place, tensor) if tensor.numel() else tensor
    module.__class__ = type(_name(exported), (Saved,), {"forward": forward, "__module__": __name__})
    assert isinstance(module, Saved)
    module.__dict__["exported"] = exported
    return module


def _name(exported: torch.export.ExportedProgram) -> str:
    """The name of the class that was saved."""
    for node in exported.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            return str(kind).rpartition(".")[2] if isinstance(kind, str) else kind.__name__
    return "Saved"


@dataclass(frozen=True)
class SavedReference:
    """A `.pt2` file, as named on the command line."""

    text: str

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether a MODEL word names such a file.

        >>> SavedReference.is_one("out/model.pt2"), SavedReference.is_one("model.py:make")
        (True, False)
        """
        return text.endswith(SUFFIX)

    def absolute(self) -> str:
        return str(Path(self.text).resolve())

    def source_hash(self) -> str:
        """SHA-256 of the file."""
        with Path(self.text).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self) -> Model:
        """The saved program with the inputs that it was exported with; its weights are read even to plan.

        Raises GraftError: G805 no such file, or one that cannot be read; G806 one that holds pickled objects;
        G807 one that was saved without its example inputs.
        """
        _check_archive(Path(self.text))
        exported = _load(Path(self.text))
        if exported.example_inputs is None:
            fail("G807", "the file was saved without the inputs that it was exported with",
                 site=self.text, help="save what `torch.export.export` gave, as it gave it")  # fmt: skip
        given, named = exported.example_inputs
        names = _names(exported, given, tuple(named))
        inputs = dict(zip(names, (*given, *named.values()), strict=True))
        module = _tree(exported, names, len(given)).eval()
        return Model(module, inputs, dynamic=_dynamic(exported, inputs))


def _load(file: Path) -> torch.export.ExportedProgram:
    for name in _output_modules(file):
        try:
            importlib.import_module(name)  # it registers the classes of its outputs
        except ImportError as error:
            library = name.partition(".")[0]
            fail("G805", f"the program returns a class of {library}, and `{name}` is not there: {error}",
                 site=str(file), help=f'pip install "graftc[{library}]"')  # fmt: skip
    said: list[BaseException] = []
    try:
        with _collected(said):
            return torch.export.load(file)
    except Exception as error:  # a custom operator that is not registered, another version's format
        first = (str(said[-1] if said else error).strip().splitlines() or ["?"])[0][:300]
        fail("G805", f"torch.export.load cannot read the program: {first}", site=str(file),
             help="export it again with this torch, or give a function that loads it: -m file.py:function")  # fmt: skip


def _output_modules(file: Path) -> list[str]:
    """The modules of transformers and diffusers that define the classes of inputs and outputs."""
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if re.search(r"(^|/)models/model\.json$", n)]
        text = archive.read(names[0]).decode(errors="replace")
    return sorted(
        set(re.findall(r'\\"type\\": \\"((?:transformers|diffusers)[\w.]*)\.\w+\\"', text))
    )


@contextmanager
def _collected(said: list[BaseException]) -> Generator[None]:
    """torch logs why a file cannot be read and raises another error: keep the first, print neither."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                said.append(record.exc_info[1])

    logger = logging.getLogger("torch.export")
    handlers: list[logging.Handler] = [Collect()]
    before, logger.propagate = logger.propagate, False
    held, logger.handlers = logger.handlers, handlers
    try:
        yield
    finally:
        logger.propagate, logger.handlers = before, held


def _check_archive(file: Path) -> None:
    """Refuse what is no such archive, and what would have to be unpickled."""
    if not file.is_file():
        fail("G805", f"no such file: {file}", site=str(file))
    if not zipfile.is_zipfile(file):
        fail("G805", f"`{file.name}` is no program that torch.export.save wrote", site=str(file),
             wanted="an archive with `models/model.json`")  # fmt: skip
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if not any(re.search(r"(^|/)models/model\.json$", n) for n in names):
            fail("G805", f"`{file.name}` is no program that torch.export.save wrote", site=str(file),
                 wanted="an archive with `models/model.json`", found=", ".join(names[:6]))  # fmt: skip
        pickled = [n for n in names if re.search(r"/(weights|constants)/[^/]*\.pt$", n)]
        for name in names:
            if re.search(r"/(weights|constants)/[^/]*config\.json$", name):
                pickled += _pickled(archive, name)
        samples = [n for n in names if "/sample_inputs/" in n]
        pickled += [n for n in samples if not _plain(archive.read(n))]
    if pickled:
        fail("G806", f"`{file.name}` holds pickled objects: {', '.join(pickled[:6])}", site=str(file),
             wanted="plain tensors alone",
             help="export it again with a torch from 2.10 on; give a function that loads it, if you trust it")  # fmt: skip


def _plain(content: bytes) -> bool:
    """Whether a file of `torch.save` holds tensors and plain containers alone; torch's reader would unpickle any."""
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return False
    return True


def _pickled(archive: zipfile.ZipFile, name: str) -> list[str]:
    try:
        entries: Mapping[str, Any] = json.loads(archive.read(name))["config"]
        return [
            tensor for tensor, payload in entries.items()
            if payload.get("use_pickle") or not re.match(r"(weight|tensor)_\d+$", payload["path_name"])
        ]  # fmt: skip
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        fail("G805", f"`{name}` of the archive cannot be read: {error}", site=str(archive.filename))


def _names(
    exported: torch.export.ExportedProgram, given: tuple[Any, ...], named: tuple[str, ...]
) -> tuple[str, ...]:
    """The inputs' names: of those that were given by position, the graph's own."""
    leaves = iter(exported.graph_signature.user_inputs)
    own: list[str] = []
    for value in given:
        names = [next(leaves) for _ in pytree.tree_leaves(value)]
        first = str(names[0]) if names and names[0] is not None else f"input_{len(own)}"
        own.append(
            first if isinstance(value, Tensor) or "_" not in first else first.rpartition("_")[0]
        )
    return (*own, *named)


def _dynamic(
    exported: torch.export.ExportedProgram, inputs: Mapping[str, Any]
) -> dict[str, dict[int, str]]:
    """The sizes that the program left open: those of dimension 0 are `batch`, others by input and place."""
    nodes = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    named: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or name not in nodes:
            continue
        for i, size in enumerate(nodes[name].shape):
            if isinstance(size, torch.SymInt):
                first = "batch" if i == 0 and "batch" not in named.values() else f"{name}_{i}"
                found.setdefault(name, {})[i] = named.setdefault(str(size), first)
    return found
