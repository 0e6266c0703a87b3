"""DATA as a folder of safetensors shards, and such a folder written once from what an encoder gives.

A shard is a batch-first dict of tensors: row i of each is one sample. A folder of shards is a data set,
sized and indexable; only the rows that are asked for are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftc.diagnostics import fail
from graftc.distillation.checkpoint import load_yaml, save_tensors, save_yaml
from graftc.distillation.sources import describe, told

VERSION = 1
MANIFEST = "manifest.yaml"
_OPEN_SHARDS = 32


@dataclass
class Shards:
    """The samples of `*.safetensors` in a folder, files in the order of their names.

    Raises GraftError (G598): no shard, one that cannot be read, tensors of different length in one shard,
    or other names than in the first.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for i in range(2):
    ...     save_tensors(folder / f"{i}.safetensors", {"x": torch.arange(3) + 3 * i}, {})
    >>> data = Shards(folder)
    >>> len(data), data[4]
    (6, {'x': tensor(4)})
    """

    folder: Path
    _files: list[Path] = field(init=False)
    _ends: list[int] = field(init=False)
    _names: tuple[str, ...] = field(init=False)
    _open: dict[int, Any] = field(default_factory=dict[int, Any])

    def __post_init__(self) -> None:
        self._files = sorted(self.folder.glob("*.safetensors"))
        if not self._files:
            fail("G598", f"`{self.folder}` holds no shard", site="DATA",
                 wanted="*.safetensors, each a batch-first dict of tensors")  # fmt: skip
        counts: list[int] = []
        self._names = ()
        for number, path in enumerate(self._files):
            file = self._opened(number)
            names = tuple(sorted(file.keys()))
            lengths = {name: (file.get_slice(name).get_shape() or [0])[0] for name in names}
            if len(set(lengths.values())) != 1:
                fail("G598", f"the tensors of `{path.name}` are not of one length", site=str(path),
                     wanted="batch-first tensors, a row a sample",
                     found=", ".join(f"{n} {size}" for n, size in lengths.items()) or "no tensors")  # fmt: skip
            self._names = self._names or names
            if names != self._names:
                fail("G598", f"`{path.name}` has other tensors than `{self._files[0].name}`",
                     site=str(path), wanted=", ".join(self._names), found=", ".join(names))  # fmt: skip
            counts.append(lengths[names[0]])
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        file = self._opened(number)
        return {name: file.get_slice(name)[row : row + 1][0] for name in self._names}

    def _opened(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            path = self._files[number]
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                fail("G598", f"cannot read `{path.name}`: {error}", site=str(path),
                     help="write the shard again, or take it out of the folder")  # fmt: skip
        return self._open[number]


def cached(
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    encode: Callable[[list[Any]], Mapping[str, Tensor]],
    folder: str | Path,
    *,
    key: str,
    batch: int = 16,
    shard: int = 512,
) -> Shards:
    """DATA of encoded samples: `encode` is run once, and its outputs are kept in `folder`.

    `encode` gets a list of at most `batch` raw samples and returns a batch-first dict of tensors: a VAE's
    latents, a text encoder's states. `data` yields the raw samples, or is a function that returns what
    does; neither is touched once the folder is whole. `key` says what made the outputs (the name of the
    encoder, a size); a folder of another key is refused (G536). Files of `shard` samples are written whole
    or not at all; a call that was broken off goes on where it was. Raises GraftError, also for outputs of
    another length than the batch (G535).

    >>> import tempfile
    >>> home = tempfile.mkdtemp()
    >>> double = lambda samples: {"x": torch.tensor([2.0 * s for s in samples])}
    >>> len(cached(range(5), double, home, key="double", batch=2)), cached([], double, home, key="double")[4]
    (5, {'x': tensor(8.)})
    """
    home = Path(folder)
    path = home / MANIFEST
    facts: dict[str, Any] = {"version": VERSION, "key": key, "shard": shard, "samples": None}
    if path.exists():
        found = load_yaml(path)
        if found.get("key") != key or found.get("version") != VERSION:
            fail("G536", f"`{home}` holds what another encoder made", site=str(path), wanted=repr(key),
                 found=repr(found.get("key")), help="delete it, or give another folder")  # fmt: skip
        facts = {**facts, "shard": found["shard"], "samples": found["samples"]}
    elif home.exists() and any(home.iterdir()):
        fail("G536", f"`{home}` holds other files, and no {MANIFEST}", site=str(home),
             help="give an empty folder")  # fmt: skip
    if facts["samples"] is None:
        home.mkdir(parents=True, exist_ok=True)
        save_yaml(path, facts)
        facts["samples"] = _fill(data, encode, home, int(facts["shard"]), batch)
        save_yaml(path, facts)
    return Shards(home)


def _fill(data: Any, encode: Any, home: Path, shard: int, batch: int) -> int:
    """Write the shards that are missing; returns how many samples there are."""
    done = len(sorted(home.glob("[0-9]*.safetensors")))
    with told("DATA"):
        given = cast("Iterable[Any]", data() if callable(data) else data)
        samples = iter(given)
        skipped = sum(1 for _ in islice(samples, done * shard))
    count = skipped
    while True:
        rows: list[Mapping[str, Tensor]] = []
        size = 0
        while size < shard:
            with told("DATA"):
                some = list(islice(samples, min(batch, shard - size)))
            if not some:
                break
            rows.append(_encoded(encode, some))
            size += len(some)
        if not rows:
            break
        merged = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        save_tensors(home / f"{count // shard:06d}.safetensors", merged, {"first": count})
        count += size
        if size < shard:
            break
    if count == 0:
        fail("G520", "DATA is empty", site="DATA", wanted="at least one sample", found="0")
    return count


def _encoded(encode: Any, samples: Sequence[Any]) -> Mapping[str, Tensor]:
    with told("encode"), torch.no_grad():
        made: Any = encode(list(samples))
    if not isinstance(made, Mapping) or not made:
        fail("G535", "the encoder returned no dict of tensors", site="encode", found=describe(made))
    outputs = cast("Mapping[str, Any]", made)
    for name, value in outputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(samples):
            fail("G535", f"the encoder's `{name}` is not batch-first", site="encode",
                 wanted=f"{len(samples)} rows", found=describe(value))  # fmt: skip
    return {name: value.detach().cpu() for name, value in outputs.items()}


def hugging_face(name: str) -> Any:
    """DATA of a data set on the hub, streamed: `NAME`, `NAME:SPLIT` (unsaid: train), or `NAME/CONFIG` after `#`.

    Raises GraftError (G599) where the package `datasets` is not installed, or cannot open it.
    """
    path, _, split = name.partition(":")
    path, _, config = path.partition("#")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        fail("G599", "a data set of Hugging Face needs the package `datasets`", site=f"hf:{name}",
             help="pip install 'graftc[data]'")  # fmt: skip
    try:
        made: Any = datasets.load_dataset(
            path, config or None, split=split or "train", streaming=True
        )  # pyright: ignore
        return made.with_format("torch")
    except Exception as error:  # whatever the hub and its scripts raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail("G599", f"cannot open the data set: {first}", site=f"hf:{name}")
