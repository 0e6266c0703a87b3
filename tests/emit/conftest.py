from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graftc.emit.examples import tensors_of
from graftc.emit.package import load_package, write_package
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.program import Program
from tests.conftest import small_dit, small_pixart
from tests.emit import models

MODELS: dict[str, Callable[[], Model]] = {
    "tiny_dit": models.tiny_dit,
    "gpt": models.gpt,
    "shared": models.shared,
    "dit": lambda: small_dit(3),
    "pixart": lambda: small_pixart(3),
}


@dataclass(frozen=True)
class Case:
    """A model, its Program, its package on disk, and the package's module."""

    model: Model
    program: Program
    directory: Path
    emitted: nn.Module

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.model.inputs.items() if isinstance(v, Tensor)}

    @property
    def text(self) -> str:
        return (self.directory / "model.py").read_text()


def run_program(program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The in-memory tree on named inputs."""
    names = [str(n.target) for n in program.root.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        return tensors_of(program.root(*[inputs.get(n) for n in names]))


def run(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(module(**inputs))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_module(program: Program, path: str, module: nn.Module) -> Program:
    """The program with one module replaced, hand-made as `apply` would; it is edited in place."""
    program.root.set_submodule(path, module)
    for _, graph_module in program.graphs():
        graph_module.recompile()
    return program


def call(program: Program, target: str) -> fx.Node:
    return next(n for n in program.root.graph.nodes if n.op == "call_module" and n.target == target)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            model = MODELS[name]()
            program = capture(model)
            directory = tmp_path_factory.mktemp(name) / "package"
            write_package(program, directory)
            made[name] = Case(model, program, directory, load_package(directory))
        return made[name]

    return get
