"""Lists of modules: which modules are lists, and how a list of them is written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from itertools import pairwise

from torch import fx, nn

# Gaps that `nn.Identity()` may fill; a list with more of them becomes a dict by number.
_MOST_GAPS = 2
_SHORT = 4
# `3`, and `3_graft0` that an edit put beside it.
_NUMBERED = re.compile(r"\d+(_\w+)?$")


def is_list(module: nn.Module) -> str | None:
    """'list' or 'dict' for a container that holds modules and nothing else, None for other modules."""
    if module._parameters or module._buffers or not module._modules:
        return None
    names = list(module._modules)
    if all(n.isdecimal() for n in names):
        rising = [int(n) for n in names]
        if rising == sorted(rising):
            gaps = rising[-1] + 1 - len(rising)
            filled = (
                gaps <= _MOST_GAPS and len(rising) <= 8 and all(map(_takes_one, module.children()))
            )
            return "list" if gaps == 0 or filled else "dict"
    if any(n in _dict_attributes() or not (n.isidentifier() or _NUMBERED.match(n)) for n in names):
        return None
    return "dict"


def _takes_one(module: nn.Module) -> bool:
    """Whether `nn.Identity()` could stand in the place of a module like this one."""
    if not isinstance(module, fx.GraphModule):
        return False
    return sum(n.op == "placeholder" for n in module.graph.nodes) == 1


def _dict_attributes() -> set[str]:
    return {n for n, _ in inspect.getmembers(nn.ModuleDict())}


def is_chain(module: fx.GraphModule) -> bool:
    """Whether a graph calls its children one after the other, as `nn.Sequential` does."""
    nodes = list(module.graph.nodes)
    calls = nodes[1:-1]
    if module._parameters or module._buffers or not calls or nodes[0].op != "placeholder":
        return False
    names = [str(n.target) for n in calls]
    if names != list(module._modules) or not all(n.isdecimal() for n in names):
        return False
    numbers = [int(n) for n in names]
    if numbers != sorted(numbers) or numbers[-1] + 1 - len(numbers) > max(_MOST_GAPS, len(numbers)):
        return False
    before = [nodes[0], *calls]
    chained = all(
        c.op == "call_module" and c.args == (b,) and not c.kwargs
        for b, c in zip(before, calls, strict=False)
    )
    return chained and nodes[-1].args[0] is calls[-1] and all(len(n.users) == 1 for n in before)


def list_members(module: nn.Module) -> Mapping[str, nn.Module]:
    return {n: m for n, m in module._modules.items() if m is not None}


def constructor_of_list(
    name: str, members: Mapping[str, nn.Module], text: Mapping[int, str]
) -> str:
    """`nn.ModuleList([Block() for _ in range(28)])`, and its forms where members differ."""
    texts = {n: text[id(m)] for n, m in members.items()}
    if name == "nn.ModuleDict":
        return _dict(texts)
    filled = _without_gaps(texts)
    if name == "nn.Sequential":
        return f"nn.Sequential({', '.join(filled)})"
    if not name:  # the arguments alone
        return ", ".join(filled)
    kinds = list(dict.fromkeys(filled))
    if len(filled) > 1 and len(kinds) == 1:
        return f"{name}([{kinds[0]} for _ in range({len(filled)})])"
    if len(filled) <= _SHORT:
        return f"{name}([{', '.join(filled)}])"
    return f"{name}([{_choice(dict(enumerate(filled)))} for i in range({len(filled)})])"


def _without_gaps(texts: Mapping[str, str]) -> list[str]:
    if not texts:
        return []
    last = max(int(n) for n in texts)
    return [texts.get(str(i), "nn.Identity()") for i in range(last + 1)]


def _dict(texts: Mapping[str, str]) -> str:
    numbered = all(n.isdecimal() for n in texts)
    kinds = list(dict.fromkeys(texts.values()))
    if numbered and len(texts) > 2 and len(kinds) <= 3:
        value = _choice({int(n): t for n, t in texts.items()})
        return (
            f"nn.ModuleDict({{str(i): {value} for i in {members_text([int(n) for n in texts])}}})"
        )
    entries = ", ".join(f'"{n}": {t}' for n, t in texts.items())
    return f"nn.ModuleDict({{{entries}}})"


def _choice(texts: Mapping[int, str]) -> str:
    """`A() if i in range(8, 21, 2) else B()`: the commonest last, the others by their places."""
    kinds: dict[str, list[int]] = {}
    for i, t in texts.items():
        kinds.setdefault(t, []).append(i)
    *rare, common = sorted(kinds, key=lambda t: (len(kinds[t]), -len(t)))
    return "".join(f"{t} if i {_belongs(kinds[t])} else " for t in rare) + common


def _belongs(places: list[int]) -> str:
    return f"== {places[0]}" if len(places) == 1 else f"in {members_text(places)}"


def members_text(places: list[int]) -> str:
    """`range(0, 12, 2)`, or a tuple where there is no one step.

    >>> members_text([8, 10, 12]), members_text([0, 1, 5])
    ('range(8, 13, 2)', '(0, 1, 5)')
    """
    step = places[1] - places[0] if len(places) > 1 else 1
    if len(places) > 2 and all(b - a == step for a, b in pairwise(places)):
        begin = f"{places[0]}, " if places[0] or step > 1 else ""
        return f"range({begin}{places[-1] + 1}{f', {step}' if step > 1 else ''})"
    return f"({', '.join(map(str, places))}{',' if len(places) == 1 else ''})"
