"""Raw samples of the user's DATA in training order, checked one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from graftc.diagnostics import GraftError, fail
from graftc.program.model import user_error

Sample = dict[str, Tensor]
_END: Any = object()


class Source(Protocol):
    """Raw samples, with their numbers in DATA, in training order.

    `take(first, count)` is a function of its arguments alone.
    """

    @property
    def size(self) -> int | None:
        """The number of distinct samples, None where it is not known."""
        ...

    def take(self, first: int, count: int) -> list[tuple[int, Sample]]: ...


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator whose state is a function of `key`.

    >>> a, b = seeded(0, "noise", 3), seeded(0, "noise", 3)
    >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
    True
    """
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A number of 63 bits that is a function of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=4)
def permutation(size: int, *key: int | str) -> list[int]:
    """A seeded order of `range(size)`."""
    return torch.randperm(size, generator=seeded(*key)).tolist()


def as_sample(raw: Any, index: int) -> Sample:
    """A raw sample as a dict of tensors. Raises GraftError (G521) for anything else."""
    if not isinstance(raw, Mapping) or not raw:
        fail("G521", f"sample {index} of DATA is no dict", site=f"DATA[{index}]",
             wanted='a dict of tensors by name, as the task reads them: {"latent": …, "label": …}, {"input_ids": …}',
             found=describe(raw), help="give each value its name")  # fmt: skip
    sample: Sample = {}
    for name, value in cast(Mapping[Any, Any], raw).items():
        try:
            sample[str(name)] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            fail("G521", f"sample {index} of DATA holds `{name}`, which is no tensor",
                 site=f"DATA[{index}]", wanted="a tensor or a number",
                 found=describe(value))  # fmt: skip
    return sample


def stack(samples: Sequence[tuple[int, Sample]], like: Sample) -> Sample:
    """Numbered samples as one batch, batch first. Raises GraftError (G522) where names or shapes differ.

    `like` is the first sample of all, so that a change between batches is seen as well.
    """
    for index, sample in samples:
        if sample.keys() != like.keys():
            fail("G522", "samples of DATA have different names", site=f"DATA[{index}]",
                 wanted=", ".join(like), found=", ".join(sample))  # fmt: skip
        for name, value in sample.items():
            if value.shape != like[name].shape:
                fail("G522", f"`{name}` changes its shape from sample to sample",
                     site=f"DATA[{index}]", wanted=shape_text(like[name]),
                     found=shape_text(value), help="pad or crop in DATA")  # fmt: skip
    return {name: torch.stack([sample[name] for _, sample in samples]) for name in like}


@dataclass
class Dataset:
    """A sized DATA, in an order that is a function of (seed, epoch)."""

    data: Any
    indices: Sequence[int]
    seed: int

    @property
    def size(self) -> int:
        return len(self.indices)

    def take(self, first: int, count: int) -> list[tuple[int, Sample]]:
        chosen: list[int] = []
        for position in range(first, first + count):
            epoch, place = divmod(position, self.size)
            chosen.append(self.indices[permutation(self.size, "order", self.seed, epoch)[place]])
        return [(index, item(self.data, index, "DATA")) for index in chosen]


@dataclass
class Stream:
    """An unsized DATA, in its own order, begun again at its end where it can be iterated twice.

    `skip` samples at the head are held out; at most `limit` after them are used (None: all).
    """

    data: Iterable[Any]
    skip: int = 0
    limit: int | None = None
    _iterator: Iterator[Any] | None = None
    _position: int = 0
    _in_epoch: int = 0

    @property
    def size(self) -> int | None:
        return self.limit

    def take(self, first: int, count: int) -> list[tuple[int, Sample]]:
        if first < self._position:
            self._restart()
            self._position = 0
        while self._position < first:
            self._next()
        found: list[tuple[int, Sample]] = []
        for _ in range(count):
            value = self._next()
            index = self.skip + self._in_epoch - 1
            found.append((index, as_sample(value, index)))
        return found

    def _restart(self) -> None:
        with told("DATA"):
            fresh = iter(self.data)
        if self._iterator is not None and fresh is self._iterator:
            fail("G523", "DATA ran out of samples and can be iterated only once", site="DATA",
                 found=f"{self._in_epoch} samples after the {self.skip} held out",
                 help="return an object with `__iter__` (or with `__len__` and `__getitem__`), "
                      "not a generator")  # fmt: skip
        self._iterator, self._in_epoch = fresh, 0
        with told("DATA"):
            for _ in range(self.skip):
                next(fresh, None)

    def _next(self) -> Any:
        for attempt in (0, 1):
            if self._iterator is None or self._in_epoch == self.limit:
                self._restart()
            assert self._iterator is not None
            with told("DATA"):
                value = next(self._iterator, _END)
            if value is _END:
                if attempt or self._in_epoch == 0:
                    break
                self._restart()
                continue
            self._position += 1
            self._in_epoch += 1
            return value
        fail("G520", "DATA has no sample left to train on", site="DATA",
             found=f"{self.skip} sample{'s' * (self.skip != 1)}, all held out" if self.skip else "no samples",
             help="give more samples, or `validation=` from elsewhere; where there are more, DATA can be read only "
                  "once: its `__iter__` must begin anew" if self.skip else None)  # fmt: skip


def is_sized(data: Any) -> bool:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        if not hasattr(data, "__iter__"):
            fail("G525", "DATA is neither a data set nor an iterable", site="DATA",
                 wanted="an object with `__len__` and `__getitem__`, or with `__iter__`",
                 found=describe(data))  # fmt: skip
        return False
    if isinstance(data, Mapping):
        fail("G525", "DATA is a dict", site="DATA", wanted="a data set or an iterable of samples",
             found=describe(data), help="yield one dict for each sample")  # fmt: skip
    return True


def head(data: Any, count: int, what: str) -> tuple[Sample, ...]:
    """The first samples of any DATA."""
    if is_sized(data):
        samples = tuple(item(data, i, what) for i in range(min(count, length(data, what))))
    else:
        with told(what):
            once = iter(data) is iter(data)  # a generator; or an object that keeps one inside
        if once:
            fail("G523", f"{what} can be iterated only once", site=what,
                 wanted="an object that can be iterated again, to resume and for further epochs",
                 found=type(data).__name__,
                 help="return an object with `__iter__`, not a generator")  # fmt: skip
        with told(what):
            raw = list(islice(data, count))
        samples = tuple(as_sample(value, i) for i, value in enumerate(raw))
    if not samples:
        fail("G520", f"{what} is empty", site=what, wanted="at least one sample", found="0")
    return samples


def item(data: Any, index: int, what: str) -> Sample:
    """One sample of a sized DATA."""
    with told(f"{what}[{index}]"):
        raw = data[index]
    return as_sample(raw, index)


def length(data: Any, what: str = "DATA") -> int:
    with told(what):
        return len(data)


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
    with told("DATA"):
        made = function()
    return Recalled(function) if isinstance(made, Iterator) else made


def data_error(error: BaseException, site: str) -> Exception:
    """A diagnostic (G527) for an exception in the user's DATA, with the user's line that raised."""
    found = user_error(error, "DATA", site)
    if isinstance(error, GraftError) or not isinstance(found, GraftError):
        return found
    return GraftError(*(replace(d, code="G527") for d in found.diagnostics))


@contextmanager
def told(site: str) -> Generator[None]:
    """Tell what the user's DATA raises as a diagnostic; a GraftError stays as it is."""
    try:
        yield
    except GraftError:
        raise
    except Exception as error:
        raise data_error(error, site) from error


def shape_text(value: Tensor) -> str:
    """`[2, 1, 8, 8] float32`."""
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def describe(value: Any) -> str:
    return shape_text(value) if isinstance(value, Tensor) else type(value).__name__
