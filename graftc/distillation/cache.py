"""A disk cache of teacher batches that outlives its run: shards, and a manifest of what they were made of."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftc.diagnostics import Note, fail
from graftc.distillation.buffer import Disk
from graftc.distillation.checkpoint import load_yaml, save_yaml
from graftc.distillation.data import Data
from graftc.distillation.sizes import Layout, Value
from graftc.distillation.stacked import structure
from graftc.distillation.targets import Cut, CutInput

VERSION = 1
MANIFEST = "manifest.yaml"


def cache_key(
    teacher: nn.Module, data: Data, task: Any, *, phase: str, batch: int, device: str
) -> dict[str, Any]:
    """What the teacher's batches are a function of, each part as a short hash or a number.

    DATA is told by its size and its held-out samples, the teacher by its structure and its weights, the
    task by its source and its settings.
    """
    return {
        "teacher": structure(teacher)[:16],
        "weights": _hash(value for _, value in sorted(teacher.state_dict().items())),
        "data": f"{data.size} samples, held out {_hash(v for s in data.held_out for v in s.values())}",
        "task": _task(task),
        "seed": data.seed,
        "phase": phase,
        "batch": batch,
        "device": torch.device(device).type,
    }


def open_cache(
    folder: Path, key: Mapping[str, Any], layout: Layout, limit: int
) -> tuple[Disk, Layout]:
    """The shards at `folder` and the layout they have: a new cache, or one that was made of the same.

    Raises GraftError (G596) for a cache of something else, naming what differs; it stays as it is.
    """
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            fail("G596", f"`{folder}` holds other files, and no {MANIFEST}", site=str(folder),
                 help="give an empty folder")  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_yaml(path, {"version": VERSION, "key": dict(key), "layout": _plain(layout)})
    found = load_yaml(path)
    if found.get("version") != VERSION:
        fail("G596", "the cache was made by another graftc", site=str(path), wanted=str(VERSION),
             found=str(found.get("version")), help="delete it, or give another --cache")  # fmt: skip
    differ = [name for name in key if found["key"].get(name) != key[name]]
    if differ:
        fail("G596", f"the cache was made of another {' and another '.join(differ)}", site=str(path),
             wanted="; ".join(f"{n} {key[n]}" for n in differ),
             found="; ".join(f"{n} {found['key'].get(n)}" for n in differ),
             help="delete it, or give another --cache")  # fmt: skip
    theirs = _layout(found["layout"])
    lacking = [cut.output for cut in layout.places if cut not in theirs.places]
    if lacking:
        kept = ", ".join(sorted({cut.output for cut in theirs.places}))
        fail("G596", f"the cache lacks the values of `{lacking[0]}`", site=str(path),
             wanted=", ".join(lacking), found=kept, notes=(Note("sites that it has need no other cache"),),
             help="give another --cache")  # fmt: skip
    return Disk(folder, limit, {"key": _digest(key)}), theirs


def _plain(layout: Layout) -> dict[str, Any]:
    return {
        "tensors": {
            name: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch."), "rows": v.rows, "nbytes": v.nbytes}
            for name, v in layout.tensors.items()
        },
        "cuts": [{**asdict(cut), "inputs": [asdict(i) for i in cut.inputs], "tensors": list(names)} for cut, names in layout.places.items()],
    }  # fmt: skip


def _layout(plain: Mapping[str, Any]) -> Layout:
    tensors = {
        name: Value(tuple(v["shape"]), getattr(torch, v["dtype"]), v["rows"], v["nbytes"])
        for name, v in plain["tensors"].items()
    }
    places = {
        Cut(c["graph"], tuple(CutInput(**i) for i in c["inputs"]), c["output"]): tuple(c["tensors"])
        for c in plain["cuts"]
    }
    return Layout(tensors, places)


def _hash(tensors: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _task(task: Any) -> str:
    """A task's class, a hash of its source, and of its settings."""
    kind = type(task)
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = ""
    settings = json.dumps(
        vars(task) if hasattr(task, "__dict__") else {}, sort_keys=True, default=repr
    )
    return f"{kind.__qualname__} {hashlib.sha256((source + settings).encode()).hexdigest()[:16]}"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shards(folder: Path) -> Sequence[Path]:
    """The whole shards of a cache, in order."""
    return sorted(folder.glob("[0-9]*.safetensors"))
