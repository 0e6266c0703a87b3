"""Classes made for an installed student, so that the library's own saving and loading work on it."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftc.emit.files as files
from graftc.diagnostics import fail
from graftc.emit.package import import_source
from graftc.installation import grafted
from graftc.installation.place import operator_at, put, refuse_masks

FOLDER = "graft"
"""Beside the weights of a saved model: the student's source, and where its modules go."""


@dataclass(frozen=True)
class Record:
    """What makes a class of an installed student: the folder with `model.py`, and its `form`."""

    source: Path
    form: Mapping[str, Any]

    def save(self, directory: Path) -> None:
        """Write the record beside a saved model."""
        folder = directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if self.source.resolve() != folder.resolve():
            for name in ("model.py", "config.yaml"):
                shutil.copyfile(self.source / name, folder / name)
        files.write_yaml(folder / "form.yaml", dict(self.form))

    @staticmethod
    def read(directory: Path) -> Record:
        """Raises GraftError where `directory` was not written by an installed model."""
        folder = directory / FOLDER
        if not (folder / "form.yaml").is_file():
            fail("G742", "this folder was not saved by an installed student", site=str(directory),
                 wanted=f"`{FOLDER}/form.yaml` beside the weights",
                 help="save with `save_pretrained` after `graftc.install`")  # fmt: skip
        return Record(folder, files.read_yaml(folder / "form.yaml"))

    def student(self) -> nn.Module:
        """The generated module, with the first weights of its own `__init__`."""
        module = import_source(self.source / "model.py")
        return getattr(module, module.load.__annotations__["return"])()

    def swap(self, root: nn.Module, student: nn.Module) -> None:
        """Put the student's modules into the original."""
        modules: Mapping[str, Any] = self.form["modules"]
        for path, entry in modules.items():
            put(root, path, operator_at(student, path, entry), entry)
        blind = [e for e in modules.values() if e["mixes_tokens"] and not e["takes_mask"]]
        absent = [n for n in self.form["absent"] if "mask" in n]
        if blind and absent:
            refuse_masks(root, absent)


def original_class(name: str) -> type[nn.Module]:
    """The class by its qualified name. Raises GraftError where it cannot be imported."""
    module, _, cls = name.rpartition(".")
    try:
        return getattr(import_module(module), cls)
    except (ImportError, AttributeError) as error:
        fail("G743", f"the original's class `{name}` cannot be imported: {error}", site=name,
             help="install its library, or load the student alone: `DIR/student/model.py`")  # fmt: skip


def grafted_class(base: type[nn.Module], record: Record) -> type[nn.Module]:
    """A subclass of the original whose instances have the student's modules in place.

    Its name differs from the original's, so that no library loads its weights into the original.
    """
    base = getattr(base, "_original", base)  # installed before: the same place, other weights
    init = base.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        record.swap(self, record.student())

    __init__.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    body: dict[str, Any] = {"__init__": __init__, "__module__": grafted.__name__, "_record": record}
    saving: Any = getattr(base, "save_pretrained", None)
    if saving is not None:

        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["variant"] = grafted.variant(kwargs.get("variant"))
            saving(self, save_directory, *args, **kwargs)
            record.save(Path(save_directory))

        body["save_pretrained"] = functools.wraps(saving)(save_pretrained)
    return type(f"{grafted.PREFIX}{base.__name__}", (grafted.facade(base),), body)


class Generated(nn.Module):
    """The generated student under the original's face: its `config`, its arguments, its output class.

    It answers at the sizes that its capture fixed; another call fails naming the fact.
    """

    def __init__(self, student: nn.Module, original: nn.Module, record: Record) -> None:
        super().__init__()
        self.student = student
        self.config = getattr(original, "config", None)
        self.config_text = _config_text(original)
        self.parameters_of_forward = tuple(inspect.signature(original.forward).parameters)
        self.output = _output_class(record.form["call"]["kind"])
        self.names = tuple(record.form["call"]["outputs"])
        self.record = record

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.parameters_of_forward, args, strict=False)) | kwargs
        wrapped = given.pop("return_dict", None)
        result = self.student(**{n: v for n, v in given.items() if _says_something(v)})
        values = result if isinstance(result, tuple) else (result,)
        if self.output is not None and wrapped is not False:
            return self.output(**dict(zip(self.names, values, strict=True)))
        return values if wrapped is False or isinstance(result, tuple) else result

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """The student's package under `graft/`, with its weights as they are now; `config.json` beside it."""
        from graftc.emit.package import save_state, stored_state

        directory = Path(save_directory)
        self.record.save(directory)
        save_state(stored_state(self.student)[0], directory / FOLDER / "model.safetensors")
        if self.config_text is not None:
            files.write_text(directory / "config.json", self.config_text)


def _config_text(original: nn.Module) -> str | None:
    """`config.json` as the library writes it: diffusers on the model, transformers on its config."""
    for holder in (original, getattr(original, "config", None)):
        write = getattr(holder, "to_json_string", None)
        if write is not None:
            return str(write())
    return None


def _says_something(value: Any) -> bool:
    """Whether an argument holds more than Nones."""
    if isinstance(value, Mapping):
        return any(_says_something(v) for v in value.values())
    return value is not None


def _output_class(kind: str) -> Any:
    return None if kind in ("tensor", "tuple") else original_class(kind)
