"""What capture cannot take, said before it is tried: wrappers, quantised weights, inputs of unknown make."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graftc.diagnostics import fail
from graftc.program.model import Model

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def check_supported(model: Model) -> None:
    """Raise GraftError for a wrapper (G251), quantised weights (G252) or an input of unknown make (G253)."""
    for path, module in model.module.named_modules():
        if isinstance(module, _WRAPPERS):
            where = f"`{path}`" if path else "the model"
            fail(
                "G251",
                f"{where} is wrapped in {type(module).__name__}, which runs it on several devices",
                site=path or "MODEL",
                wanted="the model itself",
                found=type(module).__name__,
                help=f"give `{path + '.' if path else ''}module` of it",
            )
        if "quantized" in type(module).__module__.split("."):
            fail(
                "G252",
                f"`{path}` has quantised weights",
                site=path or "MODEL",
                wanted="weights in a floating-point dtype",
                found=f"{type(module).__module__}.{type(module).__name__}",
                help="edit the model before it is quantised, then quantise the student",
            )
    for name, tensor in model.module.named_parameters():
        if not tensor.is_floating_point() and not tensor.is_complex():
            fail(
                "G252",
                f"`{name}` holds quantised weights",
                site=name,
                wanted="a floating-point dtype",
                found=str(tensor.dtype).removeprefix("torch."),
                help="edit the model before it is quantised, then quantise the student",
            )
    for name, value in model.inputs.items():
        _check_input(name, value)


def _check_input(name: str, value: Any) -> None:
    for leaf in pytree.tree_leaves(value):
        if leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str)):
            continue
        kind = "a dataclass" if dataclasses.is_dataclass(leaf) else "a class of its own"
        fail(
            "G253",
            f"input `{name}` is or holds {kind}, `{type(leaf).__name__}`, that torch.export cannot take apart",
            site=name,
            wanted="tensors, numbers, strings, None, or tuples, lists and dicts of them",
            found=type(leaf).__name__,
            help="register it with torch.export.register_dataclass, or write a module whose forward "
            "takes its fields",
        )
