"""Where the teacher's values of a training step come from: the teacher itself, or what was kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.distillation.cuts import capture_graph
from graftc.distillation.inputs import check_inputs
from graftc.distillation.targets import Cut, ModelInput

Values = Sequence[Tensor]
"""A cut's values from the teacher: its inputs in the cut's order, then its output; batch first."""


@dataclass(frozen=True)
class Batch:
    """One batch as a step sees it.

    `inputs`: the model's inputs that the task prepared; `values`: the teacher's, one entry a cut, in
    the order in which the cuts were asked for; `where` names the batch in a diagnostic.
    """

    inputs: Mapping[str, Tensor]
    values: tuple[Values, ...]
    where: str


class Activations(Protocol):
    """The batches of one phase of training."""

    def at(self, cuts: Sequence[Cut], step: int) -> Batch:
        """The batch of a step, a function of the arguments alone.

        The cuts asked for may become fewer from step to step, never more.
        """
        ...


class Teacher:
    """The frozen teacher, cut off after the last value that is wanted, and cut anew as sites finish.

    `compile` runs the pass through `torch.compile(fullgraph=True)`, by `backend`.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[ModelInput] = (),
        device: str = "cpu",
        *,
        compile: bool = False,
        backend: str = "inductor",
    ) -> None:
        self.module = module
        self._inputs, self._device = inputs, device
        self._compile, self._backend = compile, backend
        self._cut: tuple[tuple[Cut, ...], Callable[..., Any]] | None = None

    def graph(self, cuts: Sequence[Cut]) -> Callable[..., Any]:
        """The pass that ends after the last of `cuts`."""
        chosen = tuple(cuts)
        if self._cut is None or self._cut[0] != chosen:
            graph: Any = capture_graph(self.module, chosen)
            if self._compile:
                graph = torch.compile(graph, fullgraph=True, backend=self._backend)
            self._cut = chosen, graph
        return self._cut[1]

    def plain(self, cuts: Sequence[Cut]) -> nn.Module:
        """The same pass, not compiled and not kept."""
        return capture_graph(self.module, tuple(cuts))

    def run(self, cuts: Sequence[Cut], prepared: Any, where: str) -> Batch:
        """The values of `cuts` on a batch that a task prepared; its inputs are checked by name first."""
        once = tuple(dict.fromkeys(cuts))  # candidates of one site share its cut
        run = self.graph(once)
        check_inputs(prepared.inputs, self._inputs, where)
        inputs: dict[str, Tensor] = prepared.to(self._device).inputs
        with torch.no_grad():
            found: dict[Cut, Values] = dict(zip(once, run(**inputs), strict=True))
        return Batch(inputs, tuple(found[cut] for cut in cuts), where)


@dataclass(frozen=True)
class Streaming:
    """A teacher pass for every step; nothing is kept."""

    teacher: Teacher
    prepared: Callable[[int], Any]

    def at(self, cuts: Sequence[Cut], step: int) -> Batch:
        return self.teacher.run(cuts, self.prepared(step), f"step {step}")
