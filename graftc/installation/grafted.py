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


@functools.cache
def facade(base: type[nn.Module]) -> type[nn.Module]:
    """The class that stands for every student made from `base`."""

    def from_pretrained(cls: Any, folder: Any, *args: Any, **options: Any) -> Any:
        if getattr(cls, "_record", None) is not None:  # made for one student
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
