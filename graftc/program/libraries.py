"""`diffusers:CLASS@PATH_OR_ID#subfolder` and `transformers:CLASS@…`: a model by its class and its folder.

The folder holds `config.json`, and the weights as safetensors unless the model is only planned. An
id is looked up in the hub's local cache: nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftc.diagnostics import NotRunError, fail, nearest
from graftc.diagnostics.diagnostic import Diagnostic
from graftc.program.example_inputs import MEANINGS, example_inputs
from graftc.program.model import Model, user_error

LIBRARIES = ("diffusers", "transformers")
_FORM = re.compile(
    r"(?P<library>\w+):(?P<name>\w+)@(?P<where>[^#?]+)(?:#(?P<subfolder>[^?]+))?"
    r"(?:\?fixed=(?P<fixed>\w+(?:,\w+)*))?"
)


@dataclass(frozen=True)
class LibraryReference:
    """A class of a library and the folder (or hub id) that its config and weights lie in.

    `fixed`: inputs whose example values become part of the captured graph, as in `graftc.Model`.

    >>> LibraryReference.parse("diffusers:DiTTransformer2DModel@./dit#transformer").subfolder
    'transformer'
    >>> LibraryReference.parse("diffusers:Lumina2Transformer2DModel@./lumina?fixed=encoder_attention_mask").fixed
    ('encoder_attention_mask',)
    """

    text: str
    library: str
    name: str
    where: str
    subfolder: str | None = None
    fixed: tuple[str, ...] = ()

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether a MODEL word begins like a library's reference."""
        return text.partition(":")[0] in LIBRARIES and "@" in text

    @staticmethod
    def parse(text: str) -> LibraryReference:
        """Raises GraftError for one of another form."""
        found = _FORM.fullmatch(text)
        if found is None:
            fail("G221", "MODEL is not of the form `library:CLASS@PATH_OR_ID#subfolder?fixed=INPUT,INPUT`", site=text,
                 wanted="diffusers:DiTTransformer2DModel@path/to/pipeline#transformer", found=text)  # fmt: skip
        fixed = tuple((found["fixed"] or "").split(",")) if found["fixed"] else ()
        return LibraryReference(
            text, *found.group("library", "name", "where", "subfolder"), fixed=fixed
        )

    def absolute(self) -> str:
        """The same reference from any working directory."""
        if not self.is_folder:
            return self.text
        tail = f"#{self.subfolder}" if self.subfolder else ""
        tail += f"?fixed={','.join(self.fixed)}" if self.fixed else ""
        return f"{self.library}:{self.name}@{Path(self.where).resolve()}{tail}"

    @property
    def is_folder(self) -> bool:
        return Path(self.where).is_dir()

    @property
    def folder(self) -> Path | None:
        """The local folder with the config; None for a hub id."""
        return Path(self.where) / (self.subfolder or "") if self.is_folder else None

    def source_hash(self) -> str:
        """SHA-256 of `config.json` ('' for a hub id)."""
        config = self.folder / "config.json" if self.folder else None
        return (
            hashlib.sha256(config.read_bytes()).hexdigest() if config and config.is_file() else ""
        )

    def load(self, *, on_meta: bool, bare: bool = False) -> Model:
        """The model with example inputs derived from its config; without weights where `on_meta`.

        `bare`: from the config alone, with the values of its own first initialisation.

        Raises GraftError: no such class, folder, config or weights; NotRunError where the library is missing.
        """
        cls = self._class()
        self._check_folder()
        try:
            with _quiet(self.library):
                if on_meta or bare:
                    module = self._from_config(cls, "meta" if on_meta else "cpu")
                else:
                    module = self._with_weights(cls)
        except Exception as error:
            raise user_error(error, f"{self.library}.{self.name}", self.text) from error
        module.eval()
        config = _config(module)
        inputs = self._inputs(module, config, "meta" if on_meta else "cpu")
        if on_meta and self.fixed:  # their values are asked for
            real = self._inputs(module, config, "cpu")
            inputs |= {name: real[name] for name in self.fixed if name in real}
        meanings = {name: MEANINGS[name] for name in inputs if name in MEANINGS}
        return Model(module, inputs, meanings=meanings, fixed=self.fixed)

    def _inputs(self, module: nn.Module, config: Mapping[str, Any], device: str) -> dict[str, Any]:
        with torch.device(device):
            inputs = example_inputs(module, config, self.text)
        return {name: _of_dtype(value, module) for name, value in inputs.items()}

    def _class(self) -> Any:
        try:
            library = importlib.import_module(self.library)
        except ImportError as error:
            raise NotRunError(
                Diagnostic(
                    "G222",
                    f"{self.library} is not installed",
                    site=self.text,
                    help=f'pip install "graftc[{self.library}]"',
                )
            ) from error
        found = getattr(library, self.name, None)
        if not isinstance(found, type) or not issubclass(found, nn.Module):
            near = nearest(
                self.name, [n for n in dir(library) if n.endswith("Model") or "For" in n]
            )
            fail("G221", f"{self.library} has no model class `{self.name}`", site=self.text,
                 help=f"write `{self.library}:{near}@{self.where}`" if near else None)  # fmt: skip
        return found

    def _check_folder(self) -> None:
        if not self.is_folder:
            if self.where.startswith((".", "/", "~")):
                fail("G221", f"there is no folder `{self.where}`", site=self.text)
            return  # an id; the library's own error says what the cache lacks
        assert self.folder is not None
        if not (self.folder / "config.json").is_file():
            inner = sorted(p.parent.name for p in Path(self.where).glob("*/config.json"))
            fail("G221", f"`{self.folder}` has no config.json", site=self.text,
                 found=", ".join(inner) or None,
                 help=f"write `…@{self.where}#{inner[0]}`" if inner and not self.subfolder else None)  # fmt: skip
        said = json.loads((self.folder / "config.json").read_text())
        names = [said.get("_class_name"), *(said.get("architectures") or [])]
        if self.library == "diffusers" and self.name not in names:
            fail("G221", f"the config in `{self.folder}` is not of {self.name}", site=self.text,
                 wanted=self.name, found=str(names[0]))  # fmt: skip

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"local_files_only": True}
        if self.subfolder:
            options["subfolder"] = self.subfolder
        return options

    def _from_config(self, cls: Any, device: str) -> nn.Module:
        if self.library == "diffusers":
            config = cls.load_config(self.where, **self._options())
            with torch.device(device):
                return cls.from_config(config)
        config = cls.config_class.from_pretrained(self.where, **self._options())
        with torch.device(device):
            return cls(config)

    def _with_weights(self, cls: Any) -> nn.Module:
        """Read shard by shard into a model that was made without memory, each weight once."""
        return cls.from_pretrained(self.where, **self._options(), use_safetensors=True)


@contextmanager
def _quiet(library: str) -> Generator[None]:
    """Without the library's own bars and warnings: what matters is said by a diagnostic."""
    log: Any = importlib.import_module(f"{library}.utils.logging")
    shown, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


def _config(module: nn.Module) -> Mapping[str, Any]:
    config: Any = module.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _of_dtype(value: Any, module: nn.Module) -> Any:
    """Real inputs in the dtype of the weights."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), value.dtype)
    return value.to(dtype)
