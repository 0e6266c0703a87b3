"""What a wheel holds: every folder of the package, the grammar and the standard rules."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_is_named() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "graftc").rglob("*.py")}
    assert {p for p in said["packages"] if not p.startswith("graftc._data")} == folders
    for package, folder in said["package-dir"].items():
        assert (ROOT / folder).is_dir(), package
