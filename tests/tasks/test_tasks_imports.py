"""tasks/ may not know of the language or of rewriting (see docs on the layout)."""

import ast
from pathlib import Path

import graftc.tasks


def test_tasks_import_neither_language_nor_rewrite():
    for path in Path(graftc.tasks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any("language" in name or "rewrite" in name for name in names), path
