"""Teacher batches that are kept for a while: on the device, in memory, then on disk, within byte limits."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.distillation.checkpoint import save_tensors
from graftc.units import size_text

Kind = Literal["device", "memory", "disk"]
Tensors = Mapping[str, Tensor]
_OPEN_SHARDS = 128


class Shelf(Protocol):
    """A place for numbered batches, each a dict of tensors."""

    @property
    def kind(self) -> Kind: ...

    @property
    def used(self) -> int:
        """Bytes."""
        ...

    def put(self, number: int, tensors: Tensors) -> bool:
        """Keep a batch; False where it would not fit within the limit."""
        ...

    def has(self, number: int) -> bool: ...

    def read(self, number: int, name: str, rows: slice) -> Tensor:
        """Rows of one tensor of a batch."""
        ...

    def drop(self, below: int) -> None:
        """Forget the batches of numbers below `below`."""
        ...

    def rest(self) -> None:
        """Let go of what only reading needed."""
        ...


@dataclass
class Memory:
    """Batches as tensors on `device`, in at most `limit` bytes."""

    device: str
    limit: int
    used: int = 0
    _held: dict[int, Tensors] = field(default_factory=dict[int, Tensors])

    @property
    def kind(self) -> Kind:
        return "memory" if self.device == "cpu" else "device"

    def put(self, number: int, tensors: Tensors) -> bool:
        size = nbytes(tensors)
        if self.used + size > self.limit:
            return False
        kept = paged if self.device == "cpu" else _alone
        self._held[number] = {n: kept(t.to(self.device)) for n, t in tensors.items()}
        self.used += size
        return True

    def has(self, number: int) -> bool:
        return number in self._held

    def read(self, number: int, name: str, rows: slice) -> Tensor:
        tensor = self._held[number][name]
        return tensor[rows] if tensor.ndim else tensor

    def rest(self) -> None:
        pass

    def drop(self, below: int) -> None:
        for number in [n for n in self._held if n < below]:
            self.used -= nbytes(self._held.pop(number))


@dataclass
class Disk:
    """Batches as safetensors shards in `folder`, in at most `limit` bytes; each is whole or absent.

    `facts` stands in each shard's header. Raises GraftError where the disk is full (G594); the shards
    that are there stay.
    """

    folder: Path
    limit: int
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    used: int = 0
    _open: dict[int, Any] = field(default_factory=dict[int, Any])

    def __post_init__(self) -> None:
        self.used = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def kind(self) -> Kind:
        return "disk"

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def put(self, number: int, tensors: Tensors) -> bool:
        if self.used + nbytes(tensors) > self.limit:
            return False
        path = self.path(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {n: t.contiguous() for n, t in tensors.items()}, self.facts)
        except (OSError, GraftError) as error:
            why = error.diagnostics[0].found if isinstance(error, GraftError) else str(error)
            notes = (Note(f"{size_text(self.used)} of whole shards are kept"),)
            told = Diagnostic("G594", f"cannot write `{path.name}` of the teacher's batches", site=str(path),
                              found=why, notes=notes,
                              help="free some space, then resume; or give a smaller --disk, or no --cache")  # fmt: skip
            raise GraftError(told) from error
        self.used += path.stat().st_size
        return True

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def read(self, number: int, name: str, rows: slice) -> Tensor:
        try:
            file = self._opened(number)
            part = file.get_slice(name)
            return part[rows] if part.get_shape() else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            path = self.path(number)
            fail("G595", f"cannot read `{path.name}` of the teacher's batches: {error}", site=str(path),
                 help="delete the file: it is made again")  # fmt: skip

    def _opened(self, number: int) -> Any:
        """The shard, open: a turn reads rows of many."""
        if number not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[number] = safe_open(self.path(number), framework="pt")
        return self._open[number]

    def rest(self) -> None:
        """Close the shards: the pages that were read of a mapped file count as the process's memory."""
        self._open.clear()

    def drop(self, below: int) -> None:
        for path in self.folder.glob("[0-9]*.safetensors"):
            if int(path.stem) < below:
                self._open.pop(int(path.stem), None)
                self.used -= path.stat().st_size
                path.unlink()


@dataclass(frozen=True)
class Shelves:
    """Several places, the fastest first; a batch goes to the first that has room."""

    places: Sequence[Shelf]

    def put(self, number: int, tensors: Tensors) -> None:
        """Keep a batch. Raises GraftError where no place has room (G591)."""
        if not any(place.put(number, tensors) for place in self.places):
            used = ", ".join(f"{size_text(p.used)} on {p.kind}" for p in self.places)
            fail("G591", f"there is no room for a teacher batch of {size_text(nbytes(tensors))}",
                 site="the buffer", found=used or "no place at all",
                 help="give a larger --memory or --disk, or a smaller --reuse; --dry-run shows what fits")  # fmt: skip

    def has(self, number: int) -> bool:
        return any(place.has(number) for place in self.places)

    def whole(self, number: int, name: str, device: str) -> Tensor:
        return self._of(number).read(number, name, slice(None)).to(device)

    def mixed(self, numbers: Sequence[int], name: str, rows: int, device: str) -> Tensor:
        """A batch whose sample i is sample i of the batch `numbers[i]`; `rows` of the tensor are one sample's.

        Raises ValueError for a tensor that all samples share.
        """
        if rows < 1:
            raise ValueError(f"`{name}` has no rows of its own for each sample")
        parts = [
            self._of(number).read(number, name, slice(i * rows, (i + 1) * rows))
            for i, number in enumerate(numbers)
        ]
        if len({part.device for part in parts}) > 1:
            parts = [part.to(device) for part in parts]
        return torch.cat(parts).to(device)

    def drop(self, below: int) -> None:
        for place in self.places:
            place.drop(below)

    def rest(self) -> None:
        for place in self.places:
            place.rest()

    def _of(self, number: int) -> Shelf:
        return next(place for place in self.places if place.has(number))


def nbytes(tensors: Tensors) -> int:
    """Bytes that keeping the tensors takes; an expanded one's storage is smaller than its shape."""
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors.values())


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is a view that would keep a larger one alive."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def paged(tensor: Tensor) -> Tensor:
    """A copy in pages of its own, so that what is kept for long makes no holes in the heap of what comes and goes.

    >>> paged(torch.arange(3)).tolist()
    [0, 1, 2]
    """
    size = tensor.nbytes
    expanded = size > tensor.untyped_storage().nbytes()
    if expanded or not size or tensor.device.type != "cpu":
        return tensor
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    pages = torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor)
