"""docs/diagnostics.md: every code that graftc can say, read from the calls that say it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

PACKAGE = Path(__file__).parents[1] / "graftc"

_HEAD = """# What graftc says

Every code of a diagnostic, read from the source by `python docs/make.py`, never written by hand. A diagnostic prints its code, the place in
the text or the model, what was wanted, what was found and what to do; `…` stands for what is filled in there. The last column names the
part of `graftc/` that says it: `language` speaks of the text alone, before any model is read.

"""
_CODE = re.compile(r"G\d{3}")
_SHOWN = 200
_OWN_WORDS = "(in the words of what was found)"


def diagnostics_page() -> str:
    """The page: a table by code, with the messages and the part of graftc that says each.

    >>> "| G101 | unknown role" in diagnostics_page()
    True
    """
    said: dict[str, dict[str, list[str]]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        where = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for code, message in _said(ast.parse(file.read_text(encoding="utf-8"))):
            files = said.setdefault(code, {}).setdefault(message or _OWN_WORDS, [])
            files += [] if where in files else [where]
    lines = ["| code | says | in |", "|---|---|---|"]
    for code, messages in sorted(said.items()):
        files = sorted({f"`{f}`" for found in messages.values() for f in found})
        lines.append(f"| {code} | {'<br>'.join(map(_cell, messages))} | {', '.join(files)} |")
    return _HEAD + "\n".join(lines) + "\n"


def _said(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(code, message) of each call that is given a code, message "" where it is made elsewhere."""
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.Module):
            continue
        named = _named(scope)
        for call in _own(scope, ast.Call):
            given = {k.arg: k.value for k in call.keywords}
            for at, arg in enumerate([*call.args, *([given["code"]] if "code" in given else [])]):
                if isinstance(arg, ast.Constant) and _CODE.fullmatch(str(arg.value)):
                    after = [*call.args[at + 1 : at + 2], given.get("message")]
                    yield str(arg.value), _text(after[0], named) if after[0] else ""


Node = TypeVar("Node", bound=ast.AST)


def _own(scope: ast.AST, kind: type[Node]) -> Iterator[Node]:
    """What stands in a function or module and not in a function inside it."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, kind):
            yield child
        if not isinstance(child, ast.FunctionDef):
            yield from _own(child, kind)


def _named(scope: ast.AST) -> Mapping[str, str]:
    """Texts by the name that they are assigned to in `scope`; several are set apart by a stroke."""
    found: dict[str, list[str]] = {}
    for node in _own(scope, ast.Assign):
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and (text := _text(value, {})):
                    found.setdefault(name.id, []).append(text)
    return {name: " / ".join(texts) for name, texts in found.items()}


def _text(node: ast.expr, named: Mapping[str, str]) -> str:
    """A message as it is written, `…` for what is filled in; "" for what is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return named.get(name, "")
        case ast.JoinedStr(values=parts):
            return "".join(
                p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "…"
                for p in parts
            )
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            texts = _text(left, named), _text(right, named)
            return "".join(t or "…" for t in texts) if any(texts) else ""
        case ast.IfExp(body=body, orelse=other):
            texts = _text(body, named), _text(other, named)
            return " / ".join(texts) if all(texts) else ""
        case _:
            return ""


def _cell(message: str) -> str:
    text = " ".join(message.split()).replace("|", "\\|")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
