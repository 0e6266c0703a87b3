"""Regions: the parts of a model by which an export is checked, timed and traced back to rules.

A region is an edited site, a module called by a block (`blocks.3.attn`), the block's own ops
(`blocks.3`), or a module of the model outside of its blocks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graftc.emit.examples import tensors_of

WHOLE = "(model)"
"""The name of what the model computes in no module of its own."""


@dataclass(frozen=True)
class Region:
    """A region of a model: its path, the class that computes it, the rule that made it."""

    path: str
    operator: str
    rule: str
    parameters: int


def region_of(path: str, sites: Mapping[str, str]) -> str:
    """The region that a module path belongs to.

    >>> region_of("blocks.3.attn.qkv", {}), region_of("blocks.3", {}), region_of("head.norm", {})
    ('blocks.3.attn', 'blocks.3', 'head')
    >>> region_of("blocks.3.attn.mix.proj", {"blocks.3.attn.mix": "r"})
    'blocks.3.attn.mix'
    """
    if not path:
        return WHOLE
    site = site_of(path, sites) or ""
    words = path.split(".")
    at = next((i for i, w in enumerate(words) if w.isdecimal()), None)
    cut = ".".join(words[:1] if at is None else words[: at + 2])
    return max(site, cut, key=len)


def site_of(path: str, sites: Mapping[str, str]) -> str | None:
    """The innermost edited site that holds `path`."""
    holds = [s for s in sites if path == s or path.startswith(f"{s}.")]
    return max(holds, key=len, default=None)


def regions_of(model: nn.Module, sites: Mapping[str, str]) -> list[Region]:
    """The regions of a package's model, those with parameters or calls of their own, in the model's order."""
    paths = dict.fromkeys(region_of(p, sites) for p, _ in model.named_modules() if p)
    found = [
        Region(
            WHOLE, type(model).__name__, "", sum(p.numel() for p in model.parameters(recurse=False))
        )
    ]
    for path in paths:
        module = _module(model, path)
        if module is None or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        inner = sum(
            p.numel() for n, p in module.named_parameters() if region_of(f"{path}.{n}".rpartition(".")[0], sites) == path
        )  # fmt: skip
        site = site_of(path, sites)
        found.append(Region(path, type(module).__name__, sites[site] if site else "", inner))
    return found


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


@contextmanager
def watched(model: nn.Module, paths: Sequence[str]) -> Generator[dict[str, list[Tensor]]]:
    """What each region's module returned in the last call, in the order in which they returned."""
    seen: dict[str, list[Tensor]] = {}
    hooks: list[Any] = []

    def watch(path: str, module: nn.Module) -> None:
        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            found = [t for t in tensors_of(output) if t.is_floating_point()]
            if found and path not in seen:  # a module that is called twice: its first call
                seen[path] = found

        hooks.append(module.register_forward_hook(see))

    for path in paths:
        module = _module(model, path)
        if module is not None:
            watch(path, module)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


Traced = tuple[torch.export.ExportedProgram, Mapping[str, int]]
"""A traced model that also returns what its regions return, and how many tensors each does."""


def trace(
    model: nn.Module, inputs: Mapping[str, Tensor], shapes: Any, paths: Sequence[str]
) -> Traced:
    """Trace `model` with its regions' values as further outputs. Raises whatever torch.export does."""
    cls = type(model)
    plain = cls.forward
    with watched(model, paths) as seen:

        @functools.wraps(plain)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.clear()
            output = plain(self, *args, **kwargs)
            return output, {path: list(tensors) for path, tensors in seen.items()}

        made: Any = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
        model.__class__ = made
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(
                    model, (), dict(inputs), dynamic_shapes=shapes, strict=False
                )
            return exported, {path: len(tensors) for path, tensors in seen.items()}
        finally:
            model.__class__ = cls


def movements(
    model: nn.Module, regions: Sequence[Region], inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far the output moves (relative L2) when a region gives zeros: what a fault in it could be seen by.

    0.0 for a region behind a gate that is shut; golden files say nothing of such a one.
    """
    with torch.no_grad():
        whole = tensors_of(model(**inputs))
        energy = sum(float(t.double().square().sum()) for t in whole) or 1.0
        found: dict[str, float] = {}
        for region in regions:
            module = _module(model, region.path)
            if module is None or region.path == WHOLE:
                continue
            with _silenced(module):
                try:
                    moved = tensors_of(model(**inputs))
                except (RuntimeError, IndexError):  # zeros are no valid index, or no valid size
                    continue
            pairs = zip(whole, moved, strict=True)
            change = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
            found[region.path] = (change / energy) ** 0.5 if change == change else float("inf")
    return found


@contextmanager
def _silenced(module: nn.Module) -> Generator[None]:
    def zero(_module: nn.Module, _args: Any, output: Any) -> Any:
        return pytree.tree_map(
            lambda t: torch.zeros_like(t) if isinstance(t, Tensor) and t.is_floating_point() else t,
            output,
        )

    hook = module.register_forward_hook(zero)
    try:
        yield
    finally:
        hook.remove()
