"""Entry point: the application, and the exit codes of every error."""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

from graftc.diagnostics import GraftError, render, to_json


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the input is wrong, 2 usage, 3 not run."""
    from graftc.cli.commands import app

    given = sys.argv[1:] if arguments is None else arguments
    try:
        # standalone: usage errors are typer's own (exit code 2).
        app(given, standalone_mode=True)
    except GraftError as error:
        _report(error, as_json=_wants_json(given))
        sys.exit(error.exit_code)
    except OSError as error:
        from graftc.diagnostics import Diagnostic

        place = str(error.filename) if error.filename else None
        _report(
            GraftError(Diagnostic("G002", f"{error.strerror or error}", site=place)),
            _wants_json(given),
        )
        sys.exit(1)


def _wants_json(given: list[str]) -> bool:
    return "--format=json" in given or any(
        a == "--format" and b == "json" for a, b in itertools.pairwise(given)
    )


def _report(error: GraftError, as_json: bool) -> None:
    if as_json:
        body: dict[str, Any] = {"diagnostics": [to_json(d) for d in error.diagnostics]}
        print(json.dumps(body, indent=2, ensure_ascii=False))
        return
    text = "\n\n".join(render(d) for d in error.diagnostics)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        text = text.replace("error[", "\x1b[31merror\x1b[0m[")
    print(text, file=sys.stderr)
