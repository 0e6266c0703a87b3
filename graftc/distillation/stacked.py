"""Sites of one structure as one stacked module, where that is faster than one after the other.

The stack is made in the forward from the students' own parameters, and autograd hands each its
gradient: optimiser, clipping and checkpoint are the same with it and without. (A
`torch.func.stack_module_state` copy would save the copying of weights, small beside the products
with every token, but Muon's matrices would be 3-D, and the state would depend on a timing.)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap  # pyright: ignore[reportPrivateImportUsage]

from graftc.diagnostics import fail

if TYPE_CHECKING:
    from graftc.distillation.activations import Values
    from graftc.distillation.students import Student

Mode = Literal["auto", "never", "always"]
_REPEATS = 3
_TOLERANCE = 1e-4


class Stack:
    """The regions of several sites, of one structure, computed by one call.

    Takes and returns values by site name.
    """

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        self.names = tuple(members)
        self._modules = tuple(members.values())
        self._base = self._modules[0]

    def __call__(self, given: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        parameters = _stacked([dict(m.named_parameters()) for m in self._modules])
        buffers = _stacked([dict(m.named_buffers()) for m in self._modules])
        columns = zip(*(given[name] for name in self.names), strict=True)
        inputs = [torch.stack(column) for column in columns]

        def one(p: dict[str, Tensor], b: dict[str, Tensor], *x: Tensor) -> Tensor:
            return functional_call(self._base, (p, b), x)

        outputs = vmap(one, randomness="different")(parameters, buffers, *inputs)
        return dict(zip(self.names, outputs.unbind(0), strict=True))


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def alike(students: Sequence[Student], values: Sequence[Values]) -> list[list[int]]:
    """Places of students that can be stacked: one structure, shapes and trainable parameters."""
    groups: dict[str, list[int]] = {}
    for place, (student, given) in enumerate(zip(students, values, strict=True)):
        shapes = [(tuple(v.shape), str(v.dtype)) for v in student.inputs(given)]
        key = f"{structure(student.region)} {shapes}"
        groups.setdefault(key, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def structure(module: nn.Module) -> str:
    """A hash of what a module computes but not of its weights: equal for stackable ones.

    >>> structure(nn.Linear(2, 3)) == structure(nn.Linear(2, 3))
    True
    >>> structure(nn.LayerNorm(2)) == structure(nn.LayerNorm(2, eps=1.0))
    False
    """
    text: list[str] = []
    for name, child in module.named_modules():
        kind = type(child)
        if isinstance(child, fx.GraphModule):
            text.append(f"{name} graph {child.code}")
        else:
            text.append(f"{name} {kind.__module__}.{kind.__qualname__} {child.extra_repr()}")
        text.append(str(sorted((k, v) for k, v in vars(child).items() if _is_plain(k, v))))
    for name, value in module.named_parameters():
        text.append(f"{name} {tuple(value.shape)} {value.dtype} {value.requires_grad}")
    for name, value in module.named_buffers():
        text.append(f"{name} {tuple(value.shape)} {value.dtype}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _is_plain(name: str, value: Any) -> bool:
    """Attributes that a forward may read: heads, window, causal, …"""
    plain = (bool, int, float, str, tuple, list, type(None))
    return not name.startswith("_") and isinstance(value, plain)


def decide(
    mode: Mode,
    groups: Sequence[Sequence[int]],
    students: Sequence[Student],
    values: Sequence[Values],
) -> list[list[str]]:
    """Which groups to stack, as site names: all, none, or those where it is measured faster.

    A group is not stacked on `auto` where an operator has no batching rule or where the outputs
    differ by more than rounding; on `always` that raises (G544).
    """
    chosen: list[list[str]] = []
    for group in groups if mode != "never" else ():
        members = [students[i] for i in group]
        stack = Stack({s.site.name: s.region for s in members})
        given = {s.site.name: s.inputs(values[i]) for s, i in zip(members, group, strict=True)}

        def together(stack: Stack = stack, given: Any = given) -> list[Tensor]:
            return list(stack(given).values())

        def apart(members: Any = members, given: Any = given) -> list[Tensor]:
            return [s.region(*given[s.site.name]) for s in members]

        if (reason := _differ(together, apart)) is not None:
            if mode == "always":
                fail("G544", f"these sites cannot be stacked: {reason}", site=", ".join(given),
                     help='use stacked="auto"')  # fmt: skip
            continue
        weights: list[Tensor] = [p for s in members for p in s.parameters.values()]
        if mode == "always" or _seconds(together, weights) < _seconds(apart, weights):
            chosen.append([s.site.name for s in members])
    return chosen


def _differ(together: Callable[[], list[Tensor]], apart: Callable[[], list[Tensor]]) -> str | None:
    """Why the two do not agree, or None."""
    with torch.no_grad():
        try:
            ours = together()
        except Exception as error:  # whatever a user's operator raises under vmap
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        for one, other in zip(ours, apart(), strict=True):
            if (one - other).norm() > _TOLERANCE * other.norm():
                return "the stacked outputs differ from the single ones"
    return None


def _seconds(forward: Callable[[], list[Tensor]], parameters: list[Tensor]) -> float:
    """The best time of a forward and a backward."""
    best = float("inf")
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        outputs = forward()
        total = torch.stack([o.square().mean() for o in outputs]).sum()
        torch.autograd.grad(total, parameters, allow_unused=True)
        if outputs[0].is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
