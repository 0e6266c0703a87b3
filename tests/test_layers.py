"""Which folder may import which: the table of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

GRAFTC = Path(__file__).parents[1] / "graftc"
FORBIDDEN = {
    "diagnostics": [
        "torch",
        *(f"graftc.{p.name}" for p in GRAFTC.iterdir() if p.is_dir() and p.name != "diagnostics"),
    ],
    "language": ["torch"],
    "editor": ["torch"],
    "reporting": ["torch", "graftc.language", "graftc.emit", "graftc.distillation"],
    "verbs": ["graftc.cli"],
    "program": ["graftc.language"],
    "rewrite": ["graftc.distillation", "graftc.emit"],
    "operators": ["graftc.program", "graftc.rewrite"],
    "operators/specs": ["torch"],
    "weights": ["graftc.language"],
    "tasks": ["graftc.language", "graftc.rewrite"],
    "distillation": ["graftc.language"],
    "measures": ["graftc.language"],
    "emit": ["graftc.language", "graftc.distillation", "graftc.deploy"],
    "deploy": ["graftc.language", "graftc.distillation"],
    "deploy/scripts": ["graftc", "torch"],
    "installation": ["graftc.language", "graftc.rewrite", "graftc.distillation"],
}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports(folder: str) -> None:
    files = list((GRAFTC / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            for banned in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{banned}."), f"{file} imports {name}"
