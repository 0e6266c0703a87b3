"""Every command of the application, in the order of its help."""

from __future__ import annotations

from typing import Annotated

import typer

from graftc.cli import delivery, editing, training

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Edit pretrained transformers: match, replace, distil, export, verify.",
)
for part in (editing, training, delivery):  # in the order of the help
    app.add_typer(part.app)


@app.callback(invoke_without_command=True)
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[bool, typer.Option("--version", help="show the version")] = False,
) -> None:
    if version:
        from graftc import __version__

        print(f"graftc {__version__}")
        raise typer.Exit
