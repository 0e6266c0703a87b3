"""Operators of other libraries (flash-attn, xFormers): the file calls them as they are, and imports who registers them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from graftc.diagnostics import fail
from graftc.program.model import USER_MODULE
from graftc.program.program import Program

NAMESPACES = frozenset({"aten", "prims", "prim", "higher_order"})


def library_of(target: torch._ops.OpOverload, site: str = "") -> str:
    """The module that registers an operator with `torch.library.custom_op`.

    Raises GraftError (G601) where no module is known that a file of its own could import.
    """
    from torch._library.custom_ops import OPDEFS

    definition: Any = OPDEFS.get(target._schema.name)
    module = getattr(getattr(definition, "_init_fn", None), "__module__", "")
    if not module or module.startswith((USER_MODULE, "__main__")) or not _importable(module):
        fail(
            "G601",
            f"`{target}` is an operator of the library `{target.namespace}`, and no module is known that registers it",
            site=site,
            wanted="an operator of torch, or one that an importable module defines with torch.library.custom_op",
            found=module.removeprefix(USER_MODULE) or "an operator without a Python definition",
            help=f"replace what calls `torch.ops.{target.namespace}` by plain PyTorch, or define it in a module of its own",
        )
    return module


def libraries(program: Program) -> dict[str, str]:
    """Module to import → the library whose operators it registers."""
    found: dict[str, str] = {}
    for path, module in program.graphs():
        for node in module.graph.nodes:
            target: Any = node.target
            if isinstance(target, torch._ops.OpOverload) and target.namespace not in NAMESPACES:
                found[library_of(target, path)] = target.namespace
    return found


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
