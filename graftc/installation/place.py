"""A module of the student in the place of one of the original's: called as the original calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import Diagnostic, GraftError
from graftc.program.calls import argument_names, tensors_in

Step = str | int
_CHECK = "_graft_mask_check"


@dataclass(frozen=True)
class Place:
    """How a module is called where it stands.

    `parameters`: the original forward's, in order. `arguments`: where each of the operator's own, by
    position or name, lies in them, `position_embeddings[0]` as a path. `outputs`, `length`: where its results go in a
    tuple (length 0: the result is the tensor itself). `stateless`: it can hold no cache.
    """

    path: str
    parameters: tuple[str, ...]
    arguments: tuple[tuple[str, tuple[Step, ...]], ...]
    outputs: tuple[int, ...]
    length: int
    stateless: bool

    @staticmethod
    def of(path: str, original: nn.Module, entry: Mapping[str, Any]) -> Place:
        known = original._place.parameters if isinstance(original, InPlace) else None
        return Place(
            path,
            known if known is not None else argument_names(original),
            tuple((str(n), _steps(a)) for n, a in entry["arguments"].items()),
            tuple(int(s) for o in entry["outputs"] for s in _steps(o)),
            int(entry["length"]),
            bool(entry["mixes_tokens"]),
        )

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The operator's arguments in a call of the original's form. Raises GraftError for a cache."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        if self.stateless:
            for name, value in named.items():
                if value is not None and hasattr(value, "get_seq_length"):
                    raise GraftError(
                        Diagnostic(
                            "G740",
                            f"{self.path} keeps no cache, and `{name}` is one",
                            site=self.path,
                            help="call with use_cache=False",
                        )
                    )
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for name, (first, *steps) in self.arguments:
            value = named.get(str(first))
            for step in steps:
                value = value[step]  # pyright: ignore[reportOptionalSubscript]
            if name.isdigit():
                positional.append(value)
            else:
                keyword[name] = value
        return positional, keyword

    def result(self, value: Any) -> Any:
        """What the original would return: the tensor, or a tuple with None where there is none."""
        if not self.length:
            return value
        results = value if isinstance(value, tuple) else (value,)
        filled: list[Any] = [None] * self.length
        for index, result in zip(self.outputs, results, strict=True):
            filled[index] = result
        return tuple(filled)


class InPlace:
    """Mixed into an operator's class: its forward takes the original's call."""

    _place: Place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = super().forward  # type: ignore[misc]
        positional, keyword = self._place.given(args, kwargs)
        return self._place.result(forward(*positional, **keyword))


class Removed(nn.Module):
    """A branch that contributes zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Skipped(nn.Module):
    """A block that is the identity on the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def put(root: nn.Module, path: str, operator: nn.Module, entry: Mapping[str, Any]) -> None:
    """Put `operator` at `path` of the original, in its dtype and on its device."""
    original = root.get_submodule(path)
    like = next(original.parameters(), None)
    if like is None:
        like = next(root.parameters())
    cls = type(operator)
    place = Place.of(path, original, entry)
    operator.__class__ = type(
        cls.__name__, (InPlace, cls), {"_place": place, "__module__": cls.__module__}
    )
    if not like.is_meta:
        operator.to(device=like.device, dtype=like.dtype)
    operator.train(original.training)
    root.set_submodule(path, operator)


def operator_at(student: nn.Module, path: str, entry: Mapping[str, Any]) -> nn.Module:
    """The student's module for a place; what has no module there is removed or skipped."""
    if entry["edit"] == "replace":
        return student.get_submodule(path)
    return Removed() if entry["edit"] == "remove" else Skipped()


def refuse_masks(root: nn.Module, absent: list[str]) -> None:
    """A mask that the swapped operators would not see is an error, unless it masks nothing."""
    names = argument_names(root)
    before = root.__dict__.pop(_CHECK, None)
    if before is not None:  # installed again
        before.remove()

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in absent:
            for _, mask in tensors_in(given.get(name)):
                if not bool((mask == 1).all()):
                    raise GraftError(
                        Diagnostic(
                            "G741",
                            f"`{name}` masks something, and the student was made without it",
                            site=name,
                            wanted=f"no `{name}`, or one of ones",
                            help="give inputs without padding, or compile with the mask among the "
                            "example inputs and an operator that keeps masks",
                        )
                    )

    root.__dict__[_CHECK] = root.register_forward_pre_hook(check, with_kwargs=True)


def _steps(name: str) -> tuple[Step, ...]:
    """`a[0].b` → ("a", 0, "b")."""
    return tuple(int(s) if s.isdigit() else s for s in re.findall(r"[^\[\].]+", name))
