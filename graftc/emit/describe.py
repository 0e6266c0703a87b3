"""What a class's docstring says: where it stands in the model, and its shapes."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graftc.emit.classes import Class
from graftc.emit.names import Style
from graftc.program.program import value


def docstring(cls: Class, style: Style, is_root: bool) -> str:
    """Where a class stands in the model, and the shapes that it was captured with."""
    where = "" if is_root else f"`{_places(cls.paths)}`"
    shapes = _shapes(cls.module, style) if isinstance(cls.module, fx.GraphModule) else ""
    text = ": ".join(t for t in (where, shapes) if t)
    return f"{text}." if len(text) < 84 else f"{where}." if where and len(where) < 84 else ""


def _places(paths: list[str]) -> str:
    """`blocks.{0, 2, 4}.attn` for paths that differ in one number; else with a `*` for each number."""
    if len(paths) == 1:
        return paths[0]
    split = [p.split(".") for p in dict.fromkeys(paths)]
    if len({len(s) for s in split}) == 1:
        differ = [i for i, words in enumerate(zip(*split, strict=True)) if len(set(words)) > 1]
        if len(differ) == 1 and all(s[differ[0]].isdecimal() for s in split):
            at = differ[0]
            places = _numbers([int(s[at]) for s in split])
            return ".".join([*split[0][:at], f"{{{places}}}", *split[0][at + 1 :]])
    patterns = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", p) for p in paths))
    return patterns[0] if len(patterns) == 1 else f"{patterns[0]}` and `{patterns[1]}"


def _numbers(numbers: list[int]) -> str:
    """`0..27`, `0..26 step 2`, or all of them."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and len(numbers) > 2:
        step = steps.pop()
        return f"{numbers[0]}..{numbers[-1]}" + (f" step {step}" if step > 1 else "")
    return ", ".join(map(str, numbers))


def _shapes(module: fx.GraphModule, style: Style) -> str:
    nodes = list(module.graph.nodes)
    returned = nodes[-1].args[0]
    outputs = returned if isinstance(returned, (tuple, list)) else (returned,)
    inputs = [n for n in nodes if n.op == "placeholder"]
    texts = [[_shape(n, style) for n in side] for side in (inputs, outputs)]
    if any(t is None for side in texts for t in side):
        return ""
    return " -> ".join(", ".join(t for t in side if t) for side in texts)


def _shape(node: Any, style: Style) -> str | None:
    found = value(node) if isinstance(node, fx.Node) else None
    if not isinstance(found, torch.Tensor):
        return None
    sizes = [str(s) if isinstance(s, int) else style.sizes.get(str(s)) for s in found.shape]
    return None if None in sizes else f"[{', '.join(s for s in sizes if s)}]"
