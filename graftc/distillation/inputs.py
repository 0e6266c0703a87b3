"""Checks what a Task prepared against the named inputs that the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graftc.diagnostics import Note, fail, nearest
from graftc.distillation.sources import shape_text
from graftc.distillation.targets import ModelInput


def check_inputs(given: Mapping[str, Tensor], wanted: Sequence[ModelInput], site: str) -> None:
    """Names, shapes and kinds of the inputs. `site` says which batch this is.

    Raises GraftError: missing (G530), extra (G531), misshaped (G532), wrong dtype (G533).

    >>> x = ModelInput("x", ("batch", 4), "float32")
    >>> check_inputs({"x": torch.zeros(2, 4)}, [x], "step 0")
    """
    if not wanted:
        return
    names = [i.name for i in wanted]
    notes = [Note("the model takes " + "; ".join(_text(i) for i in wanted)),
             Note("the batch has " + "; ".join(f"{n} {shape_text(v)}" for n, v in given.items()))]  # fmt: skip
    for one in wanted:
        if one.name not in given:
            near = nearest(one.name, set(given) - set(names))
            fail("G530", f"the batch lacks the input `{one.name}` ({one.meaning})", site=site,
                 wanted=", ".join(names), found=", ".join(given), notes=notes,
                 help=f"`{near}` is not an input: is it `{one.name}`?" if near else None)  # fmt: skip
    for name in given:
        if name not in names:
            near = nearest(name, names)
            fail("G531", f"the batch has `{name}`, which the model does not take", site=site,
                 wanted=", ".join(names), found=", ".join(given), notes=notes,
                 help=f"did you mean `{near}`?" if near else None)  # fmt: skip
    sizes: dict[str, tuple[int, str]] = {}
    for one in wanted:
        value = given[one.name]
        fits = len(value.shape) == len(one.shape)
        for asked, size in zip(one.shape, value.shape, strict=False):
            if isinstance(asked, int):
                fits = fits and asked == size
                continue
            known, where = sizes.setdefault(asked, (size, one.name))
            if known != size:
                notes.insert(0, Note(f"`{asked}` is {known} in `{where}`"))
                fits = False
        if not fits:
            fail("G532", f"the input `{one.name}` has a shape that the model does not take",
                 site=site, wanted=_text(one), found=shape_text(value), notes=notes,
                 help="give samples of that shape; or compile with a MODEL function that returns "
                      "(module, example_inputs) of the shape that DATA has")  # fmt: skip
        dtype = getattr(torch, one.dtype, None)
        if isinstance(dtype, torch.dtype) and _kind(dtype) != _kind(value.dtype):
            fail("G533", f"the input `{one.name}` has a dtype that the model does not take",
                 site=site, wanted=_text(one), found=shape_text(value), notes=notes)  # fmt: skip


def _text(one: ModelInput) -> str:
    shape = ", ".join(str(size) for size in one.shape)
    return f"{one.name} [{shape}] {one.dtype}"


def _kind(dtype: torch.dtype) -> str:
    """Floats of another width pass: a model may be moved to another precision."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "int"
