"""What works on `.graft` files alone: format, test, serve an editor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graftc.diagnostics import Diagnostic, NotRunError, fail
from graftc.language.check import check

if TYPE_CHECKING:
    from graftc.rewrite.filetest import TestResult


def format_files(files: Sequence[str | Path], *, write: bool = True) -> list[Path]:
    """Format `.graft` files; returns those that changed (or would)."""
    from graftc.language.check import read
    from graftc.language.formatter import format_text

    changed: list[Path] = []
    for file in map(Path, files):
        before = read(file).text
        after = format_text(before, str(file))
        if after != before:
            changed.append(file)
            if write:
                partial = file.with_name(f".{file.name}.partial")
                partial.write_text(after, encoding="utf-8")
                os.replace(partial, file)
    return changed


def test_files(
    files: Sequence[str | Path],
    *,
    overrides: Mapping[str, str] | None = None,  # noqa: PT028
    allow_python: Sequence[str | Path] = (),  # noqa: PT028
) -> tuple[TestResult, ...]:
    """Run the tests that `.graft` files hold: each rule on its small graph, structure and numbers.

    A failed test is in the results, with its diagnostics. Raises GraftError for a file that is wrong, or
    that holds no test.

    >>> import graftc
    >>> rule = "rule to_silu exact { match { y = x * sigmoid(x) }\\n rewrite { y = silu(x) } }\\n"
    >>> test = "test gate of to_silu { before { y = x * sigmoid(x) }\\n inputs x: tensor[2, 8]\\n expect 2 }"
    >>> (result,) = graftc.test_files([rule + test])
    >>> result.passed, result.problems[0].found
    (False, '1 match')
    """
    checked = [(file, check(file, dict(overrides or {}))) for file in files]
    for file, rules in checked:
        if not rules.tests:
            fail(
                "G478",
                "this file has no tests",
                site=rules.files[0] if rules.files else str(file),
                wanted="test NAME of RULE { before { … } inputs … expect N }",
                help="docs/language.md shows one",
            )
    from graftc.rewrite.filetest import run_test
    from graftc.rewrite.user_files import bind

    bound = [bind(rules, allow_python) for _, rules in checked]
    return tuple(run_test(t, rules.files[0]) for rules in bound for t in rules.tests)


test_files.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def serve_editor(model: str | None = None) -> None:
    """A language server over standard input and output, until the editor hangs up.

    `model` (MODEL) is read by `graftc inspect` in a process of its own, for completion. Raises NotRunError
    where pygls is not installed.
    """
    from importlib.util import find_spec

    if find_spec("pygls") is None:
        not_installed = Diagnostic(
            "G700",
            "the language server needs pygls",
            site="graftc lsp",
            help="pip install 'graftc[lsp]'",
        )
        raise NotRunError(not_installed)
    from graftc.editor.server import serve

    serve(model)
