"""Samples of a model along the way by the Task's own sampler, the same noise each time: a PNG grid, or lines of text."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import fail
from graftc.distillation.sources import Sample, seeded
from graftc.distillation.terms import told

COUNT = 16
_GAP = 2
_SMALLEST = 64
"""Pixels of a side, below which a sample is drawn larger (each value a square)."""


@dataclass(frozen=True)
class Preview:
    """Every `every` steps, `count` samples; `options` go to the Task's `sample`, after labels of held-out samples."""

    every: int
    count: int = COUNT
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


def draw(
    model: nn.Module, task: Any, preview: Preview, held_out: tuple[Sample, ...], seed: int
) -> Tensor:
    """Samples of `model`, from noise that is a function of the seed alone: images [count, C, H, W] or tokens [count, L].

    Raises GraftError for a task that cannot sample (G203), or whose samples are neither (G555).
    """
    was_training = model.training
    options = {**conditions(task, held_out, preview.count), **preview.options}
    try:
        with told("TASK.sample"), torch.no_grad():
            found = task.sample(
                model.eval(), count=preview.count, generator=seeded("preview", seed), **options
            )
    finally:
        model.train(was_training)
    if isinstance(found, Tensor) and found.ndim == 2 and found.dtype == torch.int64:
        return found.cpu()
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
        shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        fail("G555", "the task's samples are neither images nor tokens: they cannot be previewed", site="TASK.sample",
             wanted="[count, channels, height, width], floats; or [count, tokens], int64", found=str(shown),
             help="leave out `preview`")  # fmt: skip
    return found.detach().float().cpu()


def conditions(task: Any, held_out: tuple[Sample, ...], count: int) -> dict[str, Any]:
    """What the sampler is told of the first held-out samples: labels and conditions, or what the task's `prompts` makes of them."""
    rows = [held_out[i % len(held_out)] for i in range(count)]
    prompts = getattr(task, "prompts", None)
    if prompts is not None:
        with told("TASK.prompts"):
            return prompts({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    found: dict[str, Any] = {}
    key = getattr(task, "label_key", None)
    if key in rows[0] and getattr(task, "label_name", None) is not None:
        found["labels"] = torch.stack([row[key] for row in rows])
    given = {
        name: torch.stack([row[key] for row in rows])
        for key, name in getattr(task, "conditions", ())
    }
    return {**found, "conditions": given} if given else found


def grid(samples: Tensor) -> Tensor:
    """Samples [N, C, H, W] in [-1, 1] as one picture [H', W'] or [H', W', 3] of bytes.

    Of more than three channels (latents) the first three are shown, each stretched to its own range.

    >>> grid(torch.zeros(4, 1, 64, 64)).shape
    torch.Size([134, 134])
    """
    _, channels, height, width = samples.shape
    shown = samples[:, : 3 if channels >= 3 else 1]
    if channels > 3:
        low, high = shown.amin((0, 2, 3), keepdim=True), shown.amax((0, 2, 3), keepdim=True)
        shown = 2 * (shown - low) / (high - low).clamp(min=1e-8) - 1
    values = ((shown.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    larger = max(1, -(-_SMALLEST // min(height, width)))
    values = values.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    count, _, tall, wide = values.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.full(
        (values.shape[1], rows * (tall + _GAP) + _GAP, columns * (wide + _GAP) + _GAP),
        255,
        dtype=torch.uint8,
    )
    for i, one in enumerate(values):
        top, left = (
            _GAP + (i // columns) * (tall + _GAP),
            _GAP + (i % columns) * (wide + _GAP),
        )
        sheet[:, top : top + tall, left : left + wide] = one
    return sheet[0] if len(sheet) == 1 else sheet.permute(1, 2, 0).contiguous()


def write_sheet(
    folder: Path, name: str, samples: Tensor, task: Any, about: Mapping[str, Any]
) -> str:
    """Write samples into `folder`: `NAME.png`, or `NAME.txt` of tokens; returns the file's name.

    Tokens are told by the task's `decode(tokens [L]) → str` where it has one, else as numbers; a line for each sample.
    """
    if samples.ndim == 4:
        write_png(folder / f"{name}.png", grid(samples), about)
        return f"{name}.png"
    decode = getattr(task, "decode", None) or (lambda row: " ".join(map(str, row.tolist())))
    with told("TASK.decode"):
        lines = [" ".join(str(decode(row)).split()) for row in samples]
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    _write(folder / f"{name}.txt", "\n".join([f"# {head}", *lines, ""]).encode())
    return f"{name}.txt"


def write_png(path: Path, picture: Tensor, about: Mapping[str, Any]) -> None:
    """Write bytes [H, W] or [H, W, 3] as a PNG, `about` as text inside it, in one rename."""
    height, width = picture.shape[:2]
    colour = 0 if picture.ndim == 2 else 2
    lines = picture.reshape(height, -1)
    raw = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), lines], dim=1).numpy().tobytes()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))]
    for key, value in about.items():
        parts.append((b"tEXt", f"{key}\0{value}".encode("latin-1", "replace")))
    parts += [(b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
    body = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        check = struct.pack(">I", zlib.crc32(kind + data))
        body += struct.pack(">I", len(data)) + kind + data + check
    _write(path, body)


def _write(path: Path, body: bytes) -> None:
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(body)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        fail("G550", f"cannot write `{path.name}`: {error}", site=str(path),
             help="free some space, then resume")  # fmt: skip
