"""Batches from what the user's DATA function returned: checked, in a seeded order, resumable.

DATA is a data set (sized, indexable) or an iterable of raw samples; a sample is a dict of tensors
or numbers. The order of indices is a function of (seed, epoch), the noise of (seed, step): a
resumed run needs the step's number and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from graftc.diagnostics import Diagnostic, GraftError, Note, fail

HELD_OUT = 0.1
MOST_HELD_OUT = 256
_SPLIT_SEED = 0


class Prepared(Protocol):
    """What a Task's `prepare` returns: named model inputs, and targets of the loss."""

    @property
    def inputs(self) -> dict[str, Tensor]: ...

    def to(self, device: Any) -> Prepared: ...


class Task(Protocol):
    """The part of a Task that training calls (`graftc.tasks.Task`)."""

    def prepare(self, sample: Any, generator: torch.Generator) -> Any: ...

    def loss(self, outputs: Any, prepared: Any) -> Tensor: ...

    def metrics(self, outputs: Any, prepared: Any) -> dict[str, float]: ...


Sample = dict[str, Tensor]


class Source(Protocol):
    """Raw samples in training order: `take(first, count)` is a function of its arguments alone."""

    size: int | None

    def take(self, first: int, count: int) -> list[Sample]: ...


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator whose state is a function of `key`.

    >>> a, b = seeded(0, "noise", 3), seeded(0, "noise", 3)
    >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=4)
def permutation(size: int, *key: int | str) -> list[int]:
    """A seeded order of `range(size)`."""
    return torch.randperm(size, generator=seeded(*key)).tolist()


def as_sample(raw: Any, index: int) -> Sample:
    """A raw sample as a dict of tensors. Raises GraftError (G521) for anything else."""
    if not isinstance(raw, Mapping) or not raw:
        fail("G521", f"sample {index} of DATA is no dict", site=f"DATA[{index}]",
             wanted='a dict of tensors, such as {"latent": …, "label": …}',
             found=_describe(raw), help="give each value its name")  # fmt: skip
    sample: Sample = {}
    for name, value in cast(Mapping[Any, Any], raw).items():
        try:
            sample[str(name)] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            fail("G521", f"sample {index} of DATA holds `{name}`, which is no tensor",
                 site=f"DATA[{index}]", wanted="a tensor or a number",
                 found=_describe(value))  # fmt: skip
    return sample


def stack(samples: Sequence[Sample], like: Sample, first: int) -> Sample:
    """Samples as one batch, batch first. Raises GraftError (G522) where names or shapes differ.

    `like` is the first sample of all, so that a change between batches is seen as well.
    """
    for offset, sample in enumerate(samples):
        index = first + offset
        if sample.keys() != like.keys():
            fail("G522", "samples of DATA have different names", site=f"sample {index}",
                 wanted=", ".join(like), found=", ".join(sample))  # fmt: skip
        for name, value in sample.items():
            if value.shape != like[name].shape:
                fail("G522", f"`{name}` changes its shape from sample to sample",
                     site=f"sample {index}", wanted=shape_text(like[name]),
                     found=shape_text(value), help="pad or crop in DATA")  # fmt: skip
    return {name: torch.stack([sample[name] for sample in samples]) for name in like}


@dataclass
class Dataset:
    """A sized DATA, in an order that is a function of (seed, epoch)."""

    data: Any
    indices: Sequence[int]
    seed: int
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.indices)

    def take(self, first: int, count: int) -> list[Sample]:
        chosen: list[int] = []
        for position in range(first, first + count):
            epoch, place = divmod(position, self.size)
            chosen.append(self.indices[permutation(self.size, "order", self.seed, epoch)[place]])
        return [as_sample(self._get(index), index) for index in chosen]

    def _get(self, index: int) -> Any:
        try:
            return self.data[index]
        except Exception as error:
            raise data_error(error, f"DATA[{index}]") from error


@dataclass
class Stream:
    """An unsized DATA, in its own order, begun again at its end where it can be iterated twice.

    `skip` samples at the head are held out; at most `limit` after them are used (None: all).
    """

    data: Iterable[Any]
    skip: int = 0
    limit: int | None = None
    size: int | None = None
    _iterator: Iterator[Any] | None = None
    _position: int = 0
    _in_epoch: int = 0

    def take(self, first: int, count: int) -> list[Sample]:
        if first < self._position:
            self._restart()
            self._position = 0
        while self._position < first:
            self._next()
        return [as_sample(self._next(), self.skip + self._in_epoch - 1) for _ in range(count)]

    def _restart(self) -> None:
        fresh = iter(self.data)
        if self._iterator is not None and fresh is self._iterator:
            fail("G523", "DATA ran out of samples and can be iterated only once", site="DATA",
                 found=f"{self._in_epoch} samples after the {self.skip} held out",
                 help="return an object with `__iter__` (or with `__len__` and `__getitem__`), "
                      "not a generator")  # fmt: skip
        self._iterator, self._in_epoch = fresh, 0
        for _ in range(self.skip):
            next(fresh, None)

    def _next(self) -> Any:
        for attempt in (0, 1):
            if self._iterator is None or self._in_epoch == self.limit:
                self._restart()
            assert self._iterator is not None
            try:
                value = next(self._iterator)
            except StopIteration:
                if attempt or self._in_epoch == 0:
                    break
                self._restart()
                continue
            except Exception as error:
                raise data_error(error, "DATA") from error
            self._position += 1
            self._in_epoch += 1
            return value
        fail("G520", "DATA has no sample left to train on", site="DATA",
             found=f"{self.skip} samples, all held out" if self.skip else "no samples")  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Training samples in order, and the held-out ones.

    `size` is the number of distinct training samples (None: unknown); `held_out` is kept in memory.
    """

    source: Source
    held_out: tuple[Sample, ...]
    first: Sample
    seed: int

    @property
    def size(self) -> int | None:
        return self.source.size

    def raw(self, step: int, batch: int) -> Sample:
        """The raw batch of a step: `batch` samples stacked."""
        return stack(self.source.take(step * batch, batch), self.first, step * batch)

    def prepared(self, task: Task, step: int, batch: int, phase: str) -> Any:
        """The batch of a step through the task, its noise drawn from (seed, phase, step)."""
        return prepare(task, self.raw(step, batch), seeded("noise", self.seed, phase, step))

    def validation(self, task: Task, batch: int) -> Iterator[Any]:
        """The held-out batches, always with the same noise."""
        for number, start in enumerate(range(0, len(self.held_out), batch)):
            raw = stack(self.held_out[start : start + batch], self.first, start)
            yield prepare(task, raw, seeded("validation", number))


def open_data(
    data: Any,
    *,
    seed: int = 0,
    fraction: float | None = None,
    samples: int | None = None,
    held_out: float | int = HELD_OUT,
    validation: Any = None,
) -> Data:
    """DATA ready for training.

    `fraction` is a seeded subset of a sized DATA, `samples` at most so many. `held_out` is a share
    (below 1) or a count, split off with a fixed seed, so that every run and stage holds out the same
    samples; at most 256 are used. `validation` is a DATA of its own for that instead.

    Raises GraftError: empty (G520), bad samples (G521, G522), a share of an unsized DATA (G524),
    an object that yields nothing (G525).

    >>> data = open_data([{"x": float(i)} for i in range(20)], held_out=4)
    >>> data.size, len(data.held_out), data.raw(0, 2)["x"].shape
    (16, 4, torch.Size([2]))
    """
    if validation is not None:
        held = _head(validation, MOST_HELD_OUT, "held-out DATA")
    elif _is_sized(data):
        held = ()
    else:
        share = held_out if held_out >= 1 else min(MOST_HELD_OUT, (samples or 640) * held_out)
        held = _head(data, max(1, int(share)), "DATA")
    if not _is_sized(data):
        if fraction is not None:
            fail("G524", "`data` asks for a share of DATA, and DATA has no length", site="DATA",
                 wanted="a DATA with `__len__` and `__getitem__`", found=type(data).__name__,
                 help="give a count instead: `samples = 8k`")  # fmt: skip
        skip = 0 if validation is not None else len(held)
        return Data(Stream(data, skip, samples), held, held[0], seed)

    size = len(data)
    if size == 0:
        fail("G520", "DATA is empty", site="DATA", wanted="at least one sample", found="0")
    indices = list(range(size))
    if not held:
        count = int(held_out) if held_out >= 1 else max(1, round(size * held_out))
        order = permutation(size, "split", _SPLIT_SEED)
        if size == 1:
            chosen = [0]
        else:
            chosen = order[: min(count, size - 1)]
            indices = sorted(order[len(chosen) :])
        reader = Dataset(data, chosen[:MOST_HELD_OUT], _SPLIT_SEED)
        held = tuple(reader.take(0, reader.size))
    wanted = len(indices) if fraction is None else max(1, round(len(indices) * fraction))
    wanted = min(wanted, samples or wanted)
    if wanted < len(indices):
        order = permutation(len(indices), "subset", seed)
        indices = [indices[i] for i in sorted(order[:wanted])]
    return Data(Dataset(data, indices, seed), held, held[0], seed)


def _is_sized(data: Any) -> bool:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        if not hasattr(data, "__iter__"):
            fail("G525", "DATA is neither a data set nor an iterable", site="DATA",
                 wanted="an object with `__len__` and `__getitem__`, or with `__iter__`",
                 found=_describe(data))  # fmt: skip
        return False
    if isinstance(data, Mapping):
        fail("G525", "DATA is a dict", site="DATA", wanted="a data set or an iterable of samples",
             found=_describe(data), help="yield one dict for each sample")  # fmt: skip
    return True


def _head(data: Any, count: int, what: str) -> tuple[Sample, ...]:
    """The first samples of any DATA."""
    if _is_sized(data):
        count = min(count, len(data))
        samples = tuple(as_sample(data[i], i) for i in range(count))
    else:
        if iter(data) is data:
            fail("G523", f"{what} can be iterated only once", site=what,
                 wanted="an object that can be iterated again, to resume and for further epochs",
                 found=type(data).__name__,
                 help="return an object with `__iter__`, not a generator")  # fmt: skip
        samples = tuple(as_sample(v, i) for i, v in zip(range(count), data, strict=False))
    if not samples:
        fail("G520", f"{what} is empty", site=what, wanted="at least one sample", found="0")
    return samples


def prepare(task: Task, raw: Sample, generator: torch.Generator) -> Any:
    """The task's `prepare`, an error in it told with what the batch holds (G526)."""
    try:
        return task.prepare(raw, generator)
    except GraftError:
        raise
    except Exception as error:
        held = "; ".join(f"{name} {shape_text(value)}" for name, value in raw.items())
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = f"the task cannot prepare a batch of DATA: {reason}"
        raise GraftError(Diagnostic("G526", text, site="DATA", found=held)) from error


def data_error(error: BaseException, site: str) -> GraftError:
    """A diagnostic for an exception in the user's DATA, with the line that raised."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    notes = (Note(f"{last.filename}:{last.lineno}: {last.line}"),) if last else ()
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = f"DATA raised {type(error).__name__}: {first}"
    return GraftError(Diagnostic("G527", text, site=site, notes=notes))


def shape_text(value: Tensor) -> str:
    """`[2, 1, 8, 8] float32`."""
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _describe(value: Any) -> str:
    return shape_text(value) if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class Recalled:
    """A DATA that is begun again by calling the user's function again."""

    function: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.function())


def call_data(function: Callable[[], Any]) -> Any:
    """DATA from the user's function; a generator function becomes an iterable that can be rerun.

    >>> def images():
    ...     yield {"x": 1.0}
    >>> data = call_data(images)
    >>> len(list(data)), len(list(data))
    (1, 1)
    """
    try:
        made = function()
    except Exception as error:
        raise data_error(error, "DATA") from error
    return Recalled(function) if isinstance(made, Iterator) else made
