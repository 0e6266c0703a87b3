"""Every operator that can stand in a printed file finds there each name that it reads."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

from graftc.diagnostics import GraftError
from graftc.emit.foreign import Foreign
from graftc.operators.specs import SPECS

HEAD = """from __future__ import annotations
import math
from pathlib import Path
from typing import Any
import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""
OPERATORS = sorted(
    {
        place
        for base in SPECS.values()
        for spec in (base, *base.variants.values())
        for place in (spec.module, *(form.module for form in spec.forms))
        if place
    }
)


def printed(*classes: type) -> tuple[str, dict[str, Any]]:
    """The classes as they are copied, and the namespace of the file."""
    foreign, taken = Foreign(), set[str]()
    for cls in classes:
        foreign.add(cls, taken)
    text = "\n\n\n".join([HEAD + "\n".join(sorted(foreign.imports)), *foreign.sources.values()])
    space: dict[str, Any] = {"__name__": "printed"}
    exec(compile(text, "printed", "exec"), space)
    return text, space


def read(code: CodeType) -> Iterator[str]:
    """The names of the file that a piece of code, and what it defines, reads."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from read(inner)


def annotated(text: str) -> set[str]:
    """The names that annotations have."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        for said in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if said is not None:
                found |= {n.id for n in ast.walk(said) if isinstance(n, ast.Name)}
    return found


def undefined(text: str, space: dict[str, Any], names: Iterator[str] | set[str]) -> set[str]:
    local = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)
             and isinstance(n.ctx, ast.Store)}  # in a class's body  # fmt: skip
    given = {"__name__", "__module__", "__qualname__", "__annotations__", "__firstlineno__"}
    return set(names) - set(space) - set(dir(builtins)) - local - given


@pytest.mark.parametrize("place", OPERATORS)
def test_a_printed_operator_reads_no_name_that_is_not_there(place: str) -> None:
    file, _, name = place.partition(":")
    text, space = printed(getattr(importlib.import_module(file), name))
    assert not undefined(text, space, read(compile(text, "printed", "exec")))
    assert not undefined(text, space, annotated(text))


OWN = """
from __future__ import annotations
import functools
from torch import Tensor, nn

def factor(n: int) -> int:
    return 2 * n

kept: Factor = functools.lru_cache(maxsize=4)(factor)
again = factor
Shown = Tensor | None

class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Shown:
        return x * kept(1) * again(1)
"""


def user_class(folder: Path, source: str, name: str) -> type:
    file = folder / "own_operator.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("own_operator", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["own_operator"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_a_function_that_an_assignment_names_is_printed_with_it(tmp_path: Path) -> None:
    text, space = printed(user_class(tmp_path, OWN, "Doubles"))
    assert text.count("def factor(") == 1
    assert space["Doubles"]()(torch.ones(2)).tolist() == [4, 4]
    assert not undefined(text, space, annotated(text) - {"Factor"})  # which nothing defines


def test_a_value_that_no_statement_of_its_file_names_is_refused(tmp_path: Path) -> None:
    source = OWN.replace("again = factor", "globals()['again'] = factor")
    with pytest.raises(GraftError, match="no source of `again`"):
        printed(user_class(tmp_path, source, "Doubles"))
