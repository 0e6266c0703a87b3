"""README and docs say what the code does: files shown are the files, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from graftc.cli.commands import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_shown_file_is_the_example() -> None:
    shown = re.search(r"```graft\n(.*?)```", README, re.S)
    assert shown is not None
    assert shown[1] == (ROOT / "examples/digits/hyena_and_pairs.graft").read_text()


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README


def test_every_command_shown_exists() -> None:
    help_ = CliRunner().invoke(app, ["--help"]).output
    shown = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    for verb in set(re.findall(r"^graftc (\w+)", shown, re.M)):
        assert verb in help_, verb


def test_paths_named_in_the_readme_exist() -> None:
    for path in re.findall(
        r"`((?:graftc|examples|docs|benchmarks|rules|grammar)/[\w./]*)`", README
    ):
        assert (ROOT / path).exists(), path


def test_the_digits_table_is_the_one_that_was_measured() -> None:
    table = (ROOT / "examples/digits/results/table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows
    for row in rows:
        assert row in README, row
