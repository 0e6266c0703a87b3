"""A bank: trained sites stored by content, so that a site is trained once for every build that holds it.

```
BANK/bank.yaml                         {graftc_bank: 1}
BANK/entries/KEY/entry.yaml            what it is: the parts of its key, errors, the run it came from
BANK/entries/KEY/weights.safetensors   its tensors, by their names in a student that has it
```
An entry appears whole or not at all, and never changes; several processes may write to one bank.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graftc.diagnostics import GraftError, Note, fail
from graftc.distillation.checkpoint import load_tensors, load_yaml, save_tensors, save_yaml
from graftc.distillation.identity import Identity

FORMAT = 1
HEAD = "bank.yaml"
_PARTIAL = ".writing-"


@dataclass(frozen=True)
class Entry:
    """A trained site. `source`: run, build and versions that made it; `result`: errors, losses, steps."""

    key: str
    identity: Identity
    result: Mapping[str, Any]
    source: Mapping[str, Any]
    weights: str
    bytes: int
    path: Path

    @property
    def error(self) -> float:
        return float(self.result["error_end"])

    def tensors(self) -> dict[str, Tensor]:
        """Its weights. Raises GraftError (G572) where the file is not the one that was written."""
        file = self.path / "weights.safetensors"
        if not file.is_file() or _hash(file) != self.weights:
            fail("G572", "an entry of the bank is damaged: its weights are not those that were written",
                 site=str(self.path), wanted=f"sha256 {self.weights[:16]}…",
                 found="no file" if not file.is_file() else f"sha256 {_hash(file)[:16]}…",
                 help="graftc bank DIR prune --damaged")  # fmt: skip
        return load_tensors(file)[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": FORMAT,
            "key": self.key,
            **asdict(self.identity),
            "result": dict(self.result),
            "source": dict(self.source),
            "weights": {"sha256": self.weights, "bytes": self.bytes},
        }


@dataclass(frozen=True)
class Merged:
    """What a merge did: entries taken over, entries that both had, and keys with other contents in each."""

    added: tuple[Entry, ...]
    same: tuple[Entry, ...]
    conflicts: tuple[tuple[Entry, Entry], ...]


class Bank:
    """A bank's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def open(path: str | Path, *, create: bool = False) -> Bank:
        """The bank at `path`; with `create`, a new one where nothing is.

        Raises GraftError: no bank there (G570), one of another version (G571).
        """
        folder = Path(path).absolute()
        head = folder / HEAD
        if not head.is_file():
            empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
            if not (create and empty):
                fail("G570", f"no bank here: {folder}", site=str(folder),
                     wanted=f"a directory with `{HEAD}`" + (", or an empty one" if create else ""),
                     help="`graftc distill DIR -d DATA --bank BANK` makes one")  # fmt: skip
            try:
                (folder / "entries").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fail("G550", f"cannot create `{folder}`: {error}", site=str(folder))
            save_yaml(head, {"graftc_bank": FORMAT})
        found = load_yaml(head).get("graftc_bank")
        if found != FORMAT:
            fail("G571", "this bank was written by another version of graftc", site=str(folder),
                 wanted=f"graftc_bank: {FORMAT}", found=str(found))  # fmt: skip
        return Bank(folder)

    def entries(self) -> list[Entry]:
        """All entries, by site, operator and error. Raises GraftError for one that cannot be read."""
        found = [self._read(p) for p in self._folders()]
        return sorted(found, key=lambda e: (e.identity.site, e.identity.operator, e.error, e.key))

    def find(self, key: str) -> Entry | None:
        folder = self.path / "entries" / key
        return self._read(folder) if (folder / "entry.yaml").is_file() else None

    def of_problem(self, identity: Identity) -> list[Entry]:
        """Entries of the same problem, whatever the run was, the lowest error first."""
        wanted = identity.problem_key
        found = [e for e in self.entries() if e.identity.problem_key == wanted]
        return sorted(found, key=lambda e: e.error)

    def add(
        self,
        identity: Identity,
        tensors: Mapping[str, Tensor],
        result: Mapping[str, Any],
        source: Mapping[str, Any],
    ) -> Entry:
        """Store a trained site; what is there under its key stays. Raises GraftError (G550): no room."""
        found = self.find(identity.key)
        if found is not None:
            return found

        def fill(folder: Path) -> None:
            file = folder / "weights.safetensors"
            save_tensors(file, tensors, {"key": identity.key})
            entry = Entry(
                identity.key, identity, result, source, _hash(file), file.stat().st_size, folder
            )
            save_yaml(folder / "entry.yaml", entry.to_dict())

        self._write(identity.key, fill)
        return self._read(self.path / "entries" / identity.key)

    def merge(self, other: Bank) -> Merged:
        """Take over what `other` has. Where both have a key with other weights, this bank's stay, and it is told."""
        added: list[Entry] = []
        same: list[Entry] = []
        conflicts: list[tuple[Entry, Entry]] = []
        for theirs in other.entries():
            theirs.tensors()  # a damaged entry is not spread
            ours = self.find(theirs.key)
            if ours is None:
                source = theirs.path
                self._write(theirs.key, lambda f, s=source: _copy(s, f))
                added.append(self._read(self.path / "entries" / theirs.key))
            elif ours.weights == theirs.weights:
                same.append(ours)
            else:
                conflicts.append((ours, theirs))
        return Merged(tuple(added), tuple(same), tuple(conflicts))

    def remove(self, entries: Iterable[Entry]) -> None:
        """Take entries out: first renamed, so that no reader sees half of one."""
        self.remove_folders(entry.path for entry in entries)

    def remove_folders(self, folders: Iterable[Path]) -> None:
        """The same, of folders that cannot be read as entries."""
        for folder in folders:
            gone = folder.with_name(f"{_PARTIAL}{folder.name}-{os.getpid()}")
            try:
                folder.rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                fail("G550", f"cannot remove an entry: {error}", site=str(folder))

    def damaged(self) -> list[Entry | Path]:
        """Entries whose weights are not those that were written, and folders that cannot be read as one."""
        found: list[Entry | Path] = []
        for folder in self._folders():
            try:
                entry = self._read(folder)
            except GraftError:
                found.append(folder)
                continue
            try:
                entry.tensors()
            except GraftError:
                found.append(entry)
        return found

    def _folders(self) -> list[Path]:
        home = self.path / "entries"
        return sorted(p for p in home.glob("*") if p.is_dir() and not p.name.startswith("."))

    def _read(self, folder: Path) -> Entry:
        said = load_yaml(folder / "entry.yaml")
        try:
            identity = Identity(
                said["site"], said["candidate"], said["operator"], said["problem"], said["training"]
            )
            entry = Entry(
                said["key"], identity, said["result"], said["source"],
                said["weights"]["sha256"], said["weights"]["bytes"], folder,
            )  # fmt: skip
            whole = said["version"] == FORMAT and identity.key == entry.key == folder.name
        except (KeyError, TypeError):
            whole, entry = False, None
        if not whole or entry is None:
            fail("G572", "an entry of the bank is damaged: it does not say what its key says",
                 site=str(folder), help="graftc bank DIR prune --damaged")  # fmt: skip
        return entry

    def _write(self, key: str, fill: Callable[[Path], None]) -> None:
        """A folder filled aside and renamed into place; one that another process put there first stays."""
        home = self.path / "entries"
        partial: Path | None = None
        try:
            partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{key}-", dir=home))
            fill(partial)
            partial.chmod(0o755)
            try:
                partial.rename(home / key)
            except OSError:
                if not (home / key / "entry.yaml").is_file():
                    raise
        except OSError as error:
            fail("G550", f"cannot write into the bank: {error.strerror or error}", site=str(home),
                 notes=(Note("the bank holds what it held before"),),
                 help="free some space")  # fmt: skip
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    for name in ("weights.safetensors", "entry.yaml"):
        shutil.copyfile(source / name, target / name)


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
