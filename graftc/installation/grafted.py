"""`GraftedX` for a library's class X, found by name: what a saved pipeline's index points to.

diffusers writes the module and the class of each part into `model_index.json` and imports them
again; so `DiTPipeline.from_pretrained` finds `GraftedDiTTransformer2DModel` here, which reads the
student's own modules from beside the weights.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from torch import nn

PREFIX = "Grafted"
LIBRARIES = ("diffusers", "transformers")
ROOTS = ("ModelMixin", "PreTrainedModel")
"""The libraries ask this module for them, to see that a class of it is one of theirs."""


def variant(given: str | None) -> str:
    """The libraries' `variant`, which is in the names of the weight files.

    The original's class, or an `AutoModel`, looks for files without it and finds none. By their
    usual names it would load what fits and leave the swapped modules random, with no more than a
    warning.
    """
    return "graft" if given is None else f"graft.{given}"


@functools.cache
def facade(base: type[nn.Module]) -> type[nn.Module]:
    """The class that stands for every student made from `base`."""

    def from_pretrained(cls: Any, folder: Any, *args: Any, **options: Any) -> Any:
        if getattr(cls, "_record", None) is not None:  # made for one student
            options["variant"] = variant(options.get("variant"))
            return base.from_pretrained.__func__(cls, folder, *args, **options)  # type: ignore[attr-defined]
        from graftc.installation.install import from_pretrained as load

        return load(Path(folder), **options)

    body: dict[str, Any] = {"__module__": __name__, "_original": base}
    if hasattr(base, "from_pretrained"):
        body["from_pretrained"] = classmethod(from_pretrained)
    return type(f"{PREFIX}{base.__name__}", (base,), body)


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX) or name in ROOTS:
        for library in LIBRARIES:
            try:
                base = getattr(importlib.import_module(library), name.removeprefix(PREFIX), None)
            except ImportError:
                continue
            if isinstance(base, type):
                return base if name in ROOTS else facade(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
