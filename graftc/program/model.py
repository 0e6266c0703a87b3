"""A model as its user gives it, and how a `MODEL` word on the command line is loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from graftc.diagnostics import Note, fail, nearest

if TYPE_CHECKING:
    from graftc.program.libraries import LibraryReference
    from graftc.program.saved import SavedReference

USER_MODULE = "_graftc_user_"
"""What the names of MODEL, DATA and TASK files begin with among the loaded modules."""

MEANINGS = (
    "noisy_latent",
    "timestep",
    "label",
    "caption_embedding",
    "caption_mask",
    "tokens",
    "attention_mask",
    "image",
    "resolution",
    "aspect_ratio",
    "other",
)


@dataclass(frozen=True)
class Model:
    """A module with example inputs, and what graftc cannot see in it.

    `inputs`: example inputs by the name of forward's parameter. `dynamic`: input → {dimension: name};
    absent, dimension 0 of every tensor input is `batch` where they agree. `meanings`: input → what it is
    (one of `MEANINGS`). `task`: what it is trained for, an object with `prepare`, `loss`, `sample`, `metrics`,
    or the name of one that ships. `grid`: rows and columns of the image tokens, which lie row after row.
    `streams`: the name of each token stream of a joint attention → the input that it is made of
    (`{"image": "hidden_states", "text": "encoder_hidden_states"}`), [batch, tokens, width] or, of the
    stream on the grid, an image; they are told apart by their token counts in the example.
    `fixed`: inputs that the model reads numbers from, such as a mask whose sums are lengths: their example's values
    become part of the captured graph, and they are no inputs of the student.

    >>> m = Model(nn.Linear(2, 2), {"input": torch.zeros(3, 2)})
    >>> m.meanings
    {}
    """

    module: nn.Module
    inputs: Mapping[str, Any]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    task: Any = None
    grid: tuple[int, int] | None = None
    streams: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping):
            _no_dict(self.inputs, "graftc.Model")
        for name in self.fixed:
            if not isinstance(self.inputs.get(name), torch.Tensor):
                fail(
                    "G808",
                    f"`fixed` names `{name}`, which is no tensor input",
                    site="graftc.Model",
                    wanted=", ".join(self.inputs),
                    found=name,
                )
        self._check_sizes()
        self._check_dynamic()
        self._check_tokens()
        for name, meaning in self.meanings.items():
            if name not in self.inputs:
                fail(
                    "G202",
                    f"`meanings` names `{name}`, which is no input",
                    site="graftc.Model",
                    wanted=", ".join(self.inputs),
                    found=name,
                )
            if meaning not in MEANINGS:
                near = nearest(meaning, MEANINGS)
                fail(
                    "G202",
                    f"`{meaning}` is no meaning of an input",
                    site="graftc.Model",
                    wanted=", ".join(MEANINGS),
                    found=meaning,
                    help=f"write `{near}`" if near else "write `other`",
                )

    def _check_sizes(self) -> None:
        """An example of no samples or no tokens shows nothing of what the model does."""
        for name, value in self.inputs.items():
            if isinstance(value, torch.Tensor) and value.numel() == 0:
                fail(
                    "G567",
                    f"the example input `{name}` is empty",
                    site="graftc.Model",
                    wanted="at least one sample, and one token",
                    found=str(list(value.shape)),
                )

    def _check_tokens(self) -> None:
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            fail(
                "G487",
                f"`grid` is {self.grid}",
                site="graftc.Model",
                wanted="(rows, columns) of the image tokens",
            )
        for name, given in self.streams.items():
            if not isinstance(self.inputs.get(given), torch.Tensor):
                fail(
                    "G487",
                    f"stream `{name}` names `{given}`, which is no tensor input",
                    site="graftc.Model",
                    wanted=", ".join(self.inputs),
                    found=given,
                )
        if len(set(self.stream_tokens.values())) != len(self.streams):
            fail(
                "G487",
                "the streams have the same number of tokens, and are told apart by it",
                site="graftc.Model",
                found=", ".join(f"{n}: {t}" for n, t in self.stream_tokens.items()),
                help="give example inputs with another number in one of them",
            )

    @property
    def stream_tokens(self) -> dict[str, int]:
        """Stream → its tokens in the example."""
        tokens: dict[str, int] = {}
        for name, given in self.streams.items():
            shape = self.inputs[given].shape
            if len(shape) == 3:
                tokens[name] = int(shape[1])
            elif self.grid is not None:
                tokens[name] = self.grid[0] * self.grid[1]
            else:
                fail(
                    "G487",
                    f"stream `{name}` is made of an image, and the token grid is not known",
                    site="graftc.Model",
                    wanted="grid = (rows, columns)",
                    found=f"{given} {list(shape)}",
                )
        return tokens

    def _check_dynamic(self) -> None:
        for name, dims in self.dynamic.items():
            tensor = self.inputs.get(name)
            if not isinstance(tensor, torch.Tensor):
                fail(
                    "G202",
                    f"`dynamic` names `{name}`, which is no tensor input",
                    site="graftc.Model",
                    wanted=", ".join(self.inputs),
                    found=name,
                )
            for dimension in dims:
                if not 0 <= dimension < tensor.ndim:
                    fail(
                        "G202",
                        f"`dynamic` names dimension {dimension} of `{name}`, which has {tensor.ndim}",
                        site="graftc.Model",
                        wanted=f"0..{tensor.ndim - 1}",
                        found=str(dimension),
                    )


@dataclass(frozen=True)
class Reference:
    """`path/to/file.py:function` or `package.module:function`, as named on the command line."""

    text: str
    what: str = "MODEL"

    def resolve(self) -> Callable[..., Any]:
        """The named object. Raises GraftError where there is no such file, module or name."""
        where, _, name = self.text.rpartition(":")
        if not where or not name:
            fail(
                "G200",
                f"{self.what} is not of the form `file.py:function`",
                site=self.text,
                wanted="path/to/file.py:function or package.module:function",
                found=self.text,
            )
        module = self._file_module(where) if where.endswith(".py") else self._package(where)
        if not hasattr(module, name):
            near = nearest(name, [n for n in vars(module) if not n.startswith("_")])
            fail(
                "G201",
                f"`{where}` has no `{name}`",
                site=self.text,
                help=f"write `{where}:{near}`" if near else None,
            )
        return getattr(module, name)

    def _file_module(self, where: str) -> Any:
        path = Path(where)
        if not path.is_file():
            fail("G201", f"no such file: {where}", site=self.text)
        # By its text too: a file that changed since is another module.
        named = str(path.resolve()).encode() + b"\0" + path.read_bytes()
        key = f"{USER_MODULE}{hashlib.sha256(named).hexdigest()[:12]}"
        if key in sys.modules:
            return sys.modules[key]
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        # A script finds its neighbours; so does a MODEL file.
        sys.path.insert(0, str(path.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[key]
            raise user_error(error, self.what, self.text) from error
        finally:
            sys.path.remove(str(path.resolve().parent))
        return module

    def _package(self, where: str) -> Any:
        if os.getcwd() not in sys.path:  # as `python -m` does: a package beside the user
            sys.path.append(os.getcwd())
        try:
            return importlib.import_module(where)
        except Exception as error:
            raise user_error(error, self.what, self.text) from error

    def absolute(self) -> str:
        """The same reference from any working directory (a package's is so already)."""
        where, _, name = self.text.rpartition(":")
        return f"{Path(where).resolve()}:{name}" if where.endswith(".py") else self.text

    def source_hash(self) -> str:
        """SHA-256 of the file that the reference names ('' where it has none)."""
        where = self.text.rpartition(":")[0]
        path = Path(where) if where.endswith(".py") else None
        if path is None:
            spec = importlib.util.find_spec(where)
            path = Path(spec.origin) if spec and spec.origin else None
        return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else ""


def source_of(value: object) -> dict[str, str]:
    """The class of a value and the SHA-256 of the file that defines it ('' where it has none)."""
    cls = type(value)
    try:
        path = inspect.getsourcefile(cls)
    except TypeError:  # built in, or made in an interactive session
        path = None
    found = Path(path) if path else None
    digest = hashlib.sha256(found.read_bytes()).hexdigest() if found and found.is_file() else ""
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "sha256": digest}


def user_error(error: BaseException, what: str, site: str) -> Exception:
    """A GraftError for an exception in the user's code, with the user's own line in it."""
    from graftc.diagnostics import Diagnostic, GraftError

    if isinstance(error, GraftError):
        return error
    here = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    user = [
        f
        for f in frames
        if not f.filename.startswith(here)
        and "/torch/" not in f.filename
        and not f.filename.startswith("<")
        and "importlib" not in f.filename
    ]
    notes = tuple(
        Note(f"{f.filename}:{f.lineno} in {f.name}: {(f.line or '').strip()}")
        for f in user[-2:][::-1]
    )
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return GraftError(
        Diagnostic("G203", f"{what} raised {type(error).__name__}: {first}", site=site, notes=notes)
    )


def model_reference(text: str) -> Reference | LibraryReference | SavedReference:
    """A MODEL word: a function, a library's class with a folder, or a program that torch.export saved."""
    from graftc.program.libraries import LibraryReference
    from graftc.program.saved import SavedReference

    if SavedReference.is_one(text):
        return SavedReference(text)
    return LibraryReference.parse(text) if LibraryReference.is_one(text) else Reference(text)


def load_model(
    reference: str, *, on_meta: bool = False, weights: str | Path | None = None
) -> Model:
    """The model that `reference` names; on the meta device where `on_meta` (no memory for weights).

    `weights`: a file or folder whose tensors take the place of the model's own; on meta its names and shapes
    are checked. Raises GraftError if the function raises, or returns something else than
    `(module, example_inputs)` or a `graftc.Model`, or if the weights do not fit.
    """
    model = as_model(_made(reference, on_meta, weights is not None), reference)
    if weights is not None:
        from graftc.program.given_weights import load_weights

        load_weights(model.module, Path(weights))
    return model


def _made(reference: str, on_meta: bool, bare: bool) -> Any:
    """What a MODEL word gives; `bare`: its weights come from elsewhere."""
    from graftc.program.libraries import LibraryReference

    named = model_reference(reference)
    if isinstance(named, LibraryReference):
        return named.load(on_meta=on_meta, bare=bare)
    if not isinstance(named, Reference):
        return named.load()
    function = named.resolve()
    try:
        return _call_on_meta(function) if on_meta else function()
    except Exception as error:
        raise user_error(error, "MODEL", reference) from error


def _no_dict(inputs: Any, site: str) -> NoReturn:
    fail(
        "G204",
        "example inputs are not a dict by name",
        site=site,
        wanted="a dict from forward's parameter names to example values",
        found=type(inputs).__name__ if inputs else f"an empty {type(inputs).__name__}",
    )


def as_model(made: Any, site: str = "MODEL") -> Model:
    """`(module, inputs)`, or a `Model`, as a checked `Model` in eval mode as given."""
    if isinstance(made, tuple) and len(made) == 2:  # pyright: ignore[reportUnknownArgumentType]
        made = Model(made[0], made[1])  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(made, Model) or not isinstance(made.module, nn.Module):
        fail(
            "G204",
            "MODEL returned something else than a model",
            site=site,
            wanted="(module, example_inputs) or graftc.Model",
            found=type(made).__name__,  # pyright: ignore[reportUnknownArgumentType]
            help='return `(module, {"x": example})`',
        )
    if not made.inputs:
        _no_dict(made.inputs, site)
    parameters = inspect.signature(made.module.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in made.inputs:
        if name not in parameters and not takes_any:
            near = nearest(name, parameters)
            fail(
                "G205",
                f"forward has no parameter `{name}`",
                site=site,
                wanted=", ".join(parameters),
                found=name,
                help=f"write `{near}`" if near else None,
            )
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and n not in made.inputs
    ]
    if missing:
        fail(
            "G205",
            f"example inputs lack `{missing[0]}`, which forward requires",
            site=site,
            wanted=", ".join(parameters),
            found=", ".join(made.inputs),
        )
    return made


def _call_on_meta(function: Callable[..., Any]) -> Any:
    """Build without memory; a function that needs real values while building is called plainly."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights read into meta parameters are meant to vanish
            made = function()
    except Exception:  # a second, plain call decides: its error, if any, is the user's
        made = function()
    model = as_model(made)
    if any(model.inputs[n].is_meta for n in model.fixed):
        model = as_model(function())  # their values are asked for
    inputs = {k: v if k in model.fixed else _to_meta(v) for k, v in model.inputs.items()}
    return replace(model, module=model.module.to("meta"), inputs=inputs)


def _to_meta(value: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, value)
