"""A student's weights from a file: safetensors, or what torch.save wrote; nothing is unpickled but tensors."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import fail, nearest
from graftc.program.given_weights import unreadable

AVERAGED = "ema"
"""The key under which a training checkpoint holds its averaged weights (facebookresearch/DiT, grafting)."""

_SHOWN = 8


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of `file` by name: those under `ema` where it has that key.

    Raises GraftError: G720 no such file, G721 not a file of this kind, or one that holds more than
    tensors (it is not unpickled), G722 not a state dict.
    """
    if not file.is_file():
        fail("G720", f"no such file: {file}", site="--student-weights")
    try:
        found = _read(file)
    except Exception as error:  # each library has its own errors for a file it cannot read
        fail(
            "G721",
            f"`{file.name}` {unreadable(file, error)}",
            site="--student-weights",
            wanted="safetensors, or a file of torch.save that holds tensors alone",
        )
    if isinstance(found, Mapping) and isinstance(found.get(AVERAGED), Mapping):  # pyright: ignore[reportUnknownMemberType]
        found = found[AVERAGED]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(found, Mapping) or not found:
        fail(
            "G722",
            f"`{file.name}` holds no state dict",
            site="--student-weights",
            wanted=f"names → tensors, on top or under the key `{AVERAGED}`",
            found=type(found).__name__ if not isinstance(found, Mapping) else "nothing",  # pyright: ignore[reportUnknownArgumentType]
        )
    state: dict[str, Tensor] = {}
    for name, value in found.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(value, Tensor):
            fail(
                "G722",
                f"`{name}` of `{file.name}` is no tensor",
                site="--student-weights",
                wanted=f"names → tensors, on top or under the key `{AVERAGED}`",
                found=type(value).__name__,  # pyright: ignore[reportUnknownArgumentType]
            )
        state[str(name)] = value  # pyright: ignore[reportUnknownArgumentType]
    return state


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    # Training scripts store their command line beside the weights; it is data, and nothing of it is called.
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def load_student(
    student: nn.Module, state: Mapping[str, Tensor], optional: Collection[str]
) -> None:
    """Give `student` the values of `state`, in place and in its own dtypes.

    Every parameter and buffer must be in `state` but for `optional` ones, and nothing else.
    Raises GraftError: G723 missing, G724 left over, G725 another shape, G726 not finite; the
    student is then as it was.
    """
    own = student.state_dict()
    missing = [name for name in own if name not in state and name not in optional]
    if missing:
        extra = [name for name in state if name not in own]
        near = nearest(missing[0], extra)
        fail(
            "G723",
            f"the file has no {_listed(missing)} of the student",
            site="--student-weights",
            help=f"the file has `{near}`: are the rules those that the checkpoint was made with?"
            if near
            else "are the rules those that the checkpoint was made with?",
        )
    extra = [name for name in state if name not in own]
    if extra:
        fail(
            "G724",
            f"the student has no {_listed(extra)} of the file",
            site="--student-weights",
            help="are the rules those that the checkpoint was made with?",
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            fail(
                "G725",
                f"`{name}` has another shape in the file",
                site="--student-weights",
                wanted=str(list(own[name].shape)),
                found=str(list(tensor.shape)),
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            fail(
                "G726",
                f"`{name}` of the file holds values that are not finite",
                site="--student-weights",
            )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
