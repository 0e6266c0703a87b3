"""The grammar and the rules are found the same way from a wheel, an editable install and a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = """
use std.mixers

rule mine {
    match   m = mlp in blocks odd
    replace m with mlp(ratio = 3)
    distill l2
}
"""


def call(*command: str | Path, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=clean
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.graft"
    path.write_text(FILE)
    return path


def test_from_a_checkout(file: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from graftc.cli.main import main; main(['check', {str(file)!r}])"
    assert "ok" in call(sys.executable, "-c", script, cwd=file.parent)


def test_from_an_editable_install(file: Path) -> None:
    assert "ok" in call(Path(sys.executable).parent / "graftc", "check", file, cwd=file.parent)


def test_from_a_wheel_in_an_empty_environment(file: Path, tmp_path: Path) -> None:
    """Without torch even: `graftc check` needs none of the model's world."""
    source = tmp_path / "source"  # a copy: a build leaves its folders beside the sources
    for name in ("graftc", "grammar", "rules"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        tmp_path / "dist",
        source,
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    constraints = ROOT / "constraints.txt"
    call(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    call(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        constraints,
        "lark",
        "typer",
        "rich",
        "pyyaml",
        "networkx",
        cwd=tmp_path,
    )
    assert "ok" in call(tmp_path / "env/bin/graftc", "check", file, cwd=tmp_path)
    found = call(
        python,
        "-c",
        "import graftc.language.resources as r; print(r.shipped('rules/std/mixers.graft'))",
        cwd=tmp_path,
    )
    assert "_data" in found
