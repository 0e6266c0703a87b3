"""Where in the user's own code something happens: lines out of stack traces."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from graftc.program.program import UnknownSize, value

_OURS = str(Path(__file__).parents[1])


def is_own(file: str) -> bool:
    """Whether a file is neither torch's nor graftc's."""
    return "/torch/" not in file and not file.startswith((_OURS, "<"))


def own_lines(trace: str | None) -> list[str]:
    """The last line of a node's stack trace that is the user's own: `File "a.py", line 3, in forward x += 1`."""
    lines = [line.strip() for line in (trace or "").splitlines()]
    frames = [
        f"{where} {code}" for where, code in zip(lines[::2], lines[1::2], strict=False)
        if where.startswith('File "') and is_own(where.split('"')[1])
    ]  # fmt: skip
    return frames[-1:]


@contextmanager
def sizes_told(root: nn.Module) -> Generator[None]:
    """Within, an UnknownSize is raised with the line that made the first tensor of unknown size in these graphs."""
    try:
        yield
    except UnknownSize as error:
        nodes = [n for m in root.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
        lines = [
            x for n in nodes if _is_unknown(value(n)) for x in own_lines(n.meta.get("stack_trace"))
        ]
        raise UnknownSize(lines[0] if lines else "") from error


def _is_unknown(given: Any) -> bool:
    sizes: tuple[Any, ...] = tuple(given.shape) if isinstance(given, torch.Tensor) else (given,)
    return any(
        isinstance(s, torch.SymInt) and s.node.hint is None and s.node.maybe_as_int() is None
        for s in sizes
    )


def calling_line() -> str:
    """The innermost frame of the running code that is the user's own, in the form of `own_lines` ('' where there is none)."""
    import linecache

    frame = sys._getframe(1)
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    file, number = frame.f_code.co_filename, frame.f_lineno
    code = linecache.getline(file, number).strip()
    return f'File "{file}", line {number}, in {frame.f_code.co_name} {code}'
