"""What a pass costs before it is run: shapes, bytes, FLOPs and peak memory, from fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from graftc.distillation.activations import Teacher
from graftc.distillation.resident import Bytes, bytes_of_sizes, is_small
from graftc.distillation.students import Student
from graftc.distillation.targets import Cut


class Live(TorchDispatchMode):
    """Bytes of the tensors that ops inside the context made and that are alive: now, and at most.

    Works on real tensors and on fake ones; what a kernel allocates for itself is not seen.

    >>> with Live() as live:
    ...     a = torch.zeros(100)
    ...     del a
    ...     b = torch.ones(50)
    >>> live.now, live.peak
    (200, 400)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._small, self._most_small = 0, 0
        self._known: set[int] = set()

    @property
    def most(self) -> Bytes:
        """The most that was alive, and the most of it that is cut out of a heap."""
        return Bytes(self.peak, self._most_small)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if _plain(t)}
        for tensor in tree_iter(made):
            if _plain(tensor) and id(tensor.untyped_storage()) not in given:
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._count(size)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._count(size, -1)

    def _count(self, size: int, sign: int = 1) -> None:
        self.now += sign * size
        self.peak = max(self.peak, self.now)
        if is_small(size):
            self._small += sign * size
            self._most_small = max(self._most_small, self._small)


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


@dataclass(frozen=True)
class Value:
    """A tensor of a batch: its shape, and how many of its rows belong to a sample.

    `rows` 0: the same for all samples (a table of positions). `nbytes` is what keeping it takes: an
    expanded tensor's storage is smaller than its shape.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The tensors of a batch by name, and which of them are a cut's values; shared ones stand once.

    The model's inputs are called `input.NAME`, the teacher's values by number.
    """

    tensors: Mapping[str, Value]
    places: Mapping[Cut, tuple[str, ...]]

    def wanted(self, cuts: Sequence[Cut]) -> tuple[str, ...]:
        """The names of the inputs and of all that `cuts` need."""
        chosen = {name for cut in cuts for name in self.places[cut]}
        return tuple(n for n in self.tensors if n in chosen or n.startswith("input."))

    def nbytes(self, cuts: Sequence[Cut]) -> int:
        return self.amount(cuts).alive

    def amount(self, cuts: Sequence[Cut]) -> Bytes:
        """What a batch takes: the inputs, and all that `cuts` need."""
        return bytes_of_sizes(self.tensors[name].nbytes for name in self.wanted(cuts))


@dataclass(frozen=True)
class PassCost:
    """The teacher's pass over one batch.

    `peak`: bytes alive at most while it runs, the model's inputs and the values included; weights not.
    """

    layout: Layout
    peak: Bytes
    flops: int


@dataclass(frozen=True)
class StudentCost:
    """A step of students, forward and backward. `peak` leaves out the teacher's values and the weights."""

    peak: Bytes
    evaluation: Bytes
    flops: int


def pass_cost(
    teacher: Teacher, cuts: Sequence[Cut], inputs: Mapping[str, Tensor], batch: int
) -> PassCost:
    """The cost of the pass that ends after the last of `cuts`, at `batch` samples.

    `inputs`: the model's, of any number of samples, batch first.
    """
    once = tuple(dict.fromkeys(cuts))
    graph = teacher.plain(once)
    found: list[dict[str, Tensor]] = []
    places: dict[Cut, tuple[str, ...]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for size in (batch + 1, batch):
            given = {name: _of_batch(value, size) for name, value in inputs.items()}
            with FlopCounterMode(display=False) as flops, Live() as live:
                made: Any = graph(**given)
            tensors = {f"input.{name}": value for name, value in given.items()}
            names: dict[Any, str] = {}
            for cut, values in zip(once, made, strict=True):
                for value in values:
                    name = names.setdefault(_identity(value), str(len(names)))
                    tensors[name] = value
                places[cut] = tuple(names[_identity(value)] for value in values)
            found.append(tensors)
        larger, exact = found
        entering = bytes_of_sizes(v.nbytes for n, v in exact.items() if n.startswith("input."))
        layout = {n: _value(t, larger[n], batch) for n, t in exact.items()}
        return PassCost(Layout(layout, places), live.most + entering, int(flops.get_total_flops()))


def student_cost(
    students: Sequence[Student],
    layout: Layout,
    device: str,
    loss: Callable[[Sequence[Student], Sequence[Sequence[Tensor]]], Tensor],
) -> StudentCost:
    """The cost of one step of `students` together, on the teacher's values of these shapes."""
    if not students:
        return StudentCost(Bytes(0), Bytes(0), 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [
            [
                torch.empty(value.shape, dtype=value.dtype, device=device)
                for value in (layout.tensors[name] for name in layout.places[s.site.teacher])
            ]
            for s in students
        ]
        parameters = [p for s in students for p in s.parameters.values()]
        with FlopCounterMode(display=False) as flops, Live() as live:
            torch.autograd.grad(loss(students, given), parameters, allow_unused=True)
        most = Bytes(0)
        for student, rows in zip(students, given, strict=True):
            with Live() as alone, torch.no_grad():
                output = student.region(*student.inputs(rows))
                exact = 8 * output.numel()
            errors = bytes_of_sizes([output.nbytes, exact, exact, exact])  # they are in float64
            most = max(most, alone.most, errors, key=lambda one: one.alive)
            del output
    return StudentCost(live.most, most, int(flops.get_total_flops()))


def _of_batch(value: Tensor, batch: int) -> Tensor:
    shape = (batch, *value.shape[1:]) if value.ndim else value.shape
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _identity(value: Tensor) -> Any:
    """Equal for two views of the same memory."""
    place = value.untyped_storage()._cdata, value.storage_offset()
    return *place, tuple(value.shape), value.stride(), value.dtype


def _value(tensor: Tensor, larger: Tensor, batch: int) -> Value:
    """With one sample more, a tensor is longer by the rows of a sample."""
    rows = tensor.shape[0] // batch if tensor.ndim and len(tensor) != len(larger) else 0
    kept = min(tensor.nbytes, tensor.untyped_storage().nbytes())
    return Value(tuple(tensor.shape), tensor.dtype, rows, kept)
