"""The command line: parses arguments, calls the verbs, renders what they return. Thin."""

from graftc.cli.main import main

__all__ = ["main"]
