"""The Task protocol: the only place where noise is drawn, labels are dropped and a loss is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """One batch made ready: the model's named inputs, and what the loss needs beside the outputs.

    `inputs` are keyword arguments of the model's forward; `targets` may hold noise, clean samples, timesteps, labels, …

    >>> prepared = Prepared(inputs={"x": torch.ones(2, 3)})
    >>> prepared.to("cpu").inputs["x"].shape
    torch.Size([2, 3])
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def to(self, device: torch.device | str) -> Prepared:
        """The same batch on `device`."""
        return Prepared(
            {name: value.to(device) for name, value in self.inputs.items()},
            {name: value.to(device) for name, value in self.targets.items()},
        )


@runtime_checkable
class Task(Protocol):
    """What a model is trained for. Stage 1, stage 2, previews, selectors and evaluation all go through these four."""

    def prepare(self, sample: Mapping[str, Tensor], generator: torch.Generator) -> Prepared:
        """Turn a batch of raw samples into model inputs and loss targets.

        `sample` holds stacked tensors, batch first, on any device. Every random draw comes from `generator`, a CPU generator,
        so that the same state gives the same batch on every device. Each sample is prepared on its own, and has the same noise
        in whatever batch it stands: draw with `randn`, `rand` and `randint` of `graftc.tasks.noise`. A task that hands
        `generator` to torch's own functions is right too; it is then called with one sample at a time.
        """
        ...

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        """The training loss, a scalar, from what the model returned."""
        ...

    def sample(
        self, model: Callable[..., Any], *, count: int, generator: torch.Generator, **options: Any
    ) -> Tensor:
        """Draw `count` outputs from `model`; the options are the task's own."""
        ...

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        """Named figures for a report, on one batch."""
        ...


def primary(outputs: Any) -> Tensor:
    """The one tensor a task looks at: the output itself, the first of a tuple or list, or `.sample` or `.logits`.

    Raises TypeError, naming the type, for anything else.

    >>> primary((torch.ones(2), "cache"))
    tensor([1., 1.])
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("sample", "logits"):
        value = getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(outputs, (tuple, list)):
        first = next(iter(cast("Sequence[object]", outputs)), None)
        if isinstance(first, Tensor):
            return first
    kind = type(cast("object", outputs)).__name__
    raise TypeError(
        f"a model must return a tensor, a tuple that begins with one, or an object with .sample or .logits, not {kind}"
    )


def divergence(logits: Tensor, wanted: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean KL(teacher ‖ student) in nats over the last axis of logits [B, …, K]; `counted` [B, …] says where.

    Source: Hinton et al. 2015 (arXiv 1503.02531), at temperature 1.

    >>> divergence(torch.zeros(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    ours, theirs = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    found = (theirs.exp() * (theirs - ours)).sum(-1)
    if counted is None:
        return found.mean()
    return (found * counted).sum() / counted.sum().clamp(min=1)


def entry(sample: Mapping[str, Tensor], name: str, task: str) -> Tensor:
    """`sample[name]`, or a KeyError that says which task asked and what the sample holds."""
    if name not in sample:
        raise KeyError(f"task {task} needs {name!r} in each sample; the data gave {sorted(sample)}")
    return sample[name]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` [B] for broadcasting against `like` [B, …], in its dtype and on its device.

    >>> per_sample(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))
