from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from graftc.deploy.directory import Export, export_module
from graftc.deploy.request import read_request
from graftc.emit.build import Build, write_build
from graftc.program.capture import capture
from tests.emit import models
from tests.emit.conftest import with_module

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny DiT of which one attention is a token mixer, as a rule would have made it."""
    model = models.tiny_dit()
    student = with_module(capture(model), "blocks.2.attn", models.token_mixer(32))
    return write_build(
        tmp_path_factory.mktemp("deploy") / "build", student=student, teacher=capture(model), plan={}, targets={},
        manifest={}, copy_teacher=True, provenance={"blocks.2.attn": "mix @ dit.graft:3"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def exported(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """The build's student, exported once in each precision, for TensorRT."""
    made: dict[str, Export] = {}

    def get(precision: str) -> Export:
        if precision not in made:
            config = build.config()
            request = read_request(
                config, to="tensorrt", precision=precision, dynamic="batch=1:2:4"
            )
            folder = tmp_path_factory.mktemp(precision) / "out"
            facts = {"graftc.version": "0"}
            made[precision] = export_module(build.student(), config, folder, request, facts=facts)
        return made[precision]

    return get


@pytest.fixture
def copy(exported: Callable[[str], Export], tmp_path: Path) -> Path:
    """A copy of the float32 export that a test may spoil."""
    return Path(shutil.copytree(exported("fp32").path, tmp_path / "copy"))
