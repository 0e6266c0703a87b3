"""Writes the pages and files of docs/ that are made from the code. `--check` changes nothing.

python docs/make.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from graftc.editor.textmate import grammar as textmate
from graftc.language.resources import grammar_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from diagnostics_page import diagnostics_page  # noqa: E402
from operators_page import operators_page  # noqa: E402

_HEAD = """# The grammar

Made from [`grammar/graft.lark`](../grammar/graft.lark) by `python docs/make.py`; that file is the specification. What each construct
means: [language.md](language.md).

`x*` is any number of x, `x+` at least one, `x?` at most one; `|` separates choices. Words and signs between quotes stand as they are.
NL is the end of a line. How a text becomes words, and where a line ends:

"""

_HEADINGS = {"terminals: words": "words", "terminals: the rest": "names, numbers, strings"}


def grammar_page(text: str) -> str:
    """docs/grammar.md: rules as plain text, with words and signs in place of terminals' names."""
    lines = text.splitlines()
    intro = [line.removeprefix("//").strip() for line in _until_code(lines)]
    terminals = dict(_terminals(lines))
    return (
        _HEAD + "\n".join(_quoted(intro)) + "\n\n" + "\n".join(_sections(lines, terminals)) + "\n"
    )


def _until_code(lines: list[str]) -> Iterator[str]:
    for line in lines[2:]:
        if not line.startswith("//"):
            return
        yield line


def _quoted(intro: list[str]) -> Iterator[str]:
    """The remarks at the top as a list."""
    for line in intro:
        if line.startswith("* "):
            yield f"- {line[2:]}"
        elif line.startswith(("How the text becomes tokens", "What a construct means")):
            continue
        elif line:
            yield f"  {line}"


def _terminals(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        found = re.fullmatch(r"([A-Z]+): (.+)", line)
        if found:
            yield found.group(1), found.group(2)


def _sections(lines: list[str], terminals: Mapping[str, str]) -> Iterator[str]:
    """A heading for each `// -- title`, its rules in one code block; comments stay comments."""
    block: list[str] = []
    started = False
    for line in lines[len(list(_until_code(lines))) + 2 :]:
        title = re.match(r"// -- (.+?) -*$", line)
        if title:
            yield from _fenced(block)
            block = []
            heading = _HEADINGS.get(title.group(1), title.group(1))
            yield f"## {heading.capitalize()}\n"
            if title.group(1) == "terminals: words":
                words = sorted(v[1:-1] for v in terminals.values() if v[1:-1].isalpha())
                yield ", ".join(f"`{w}`" for w in words) + "\n"
            started = True
        elif not started and line.strip() and not block:
            yield "## A file\n"
            block, started = [_rule(line, terminals)], True
        elif re.match(r"[A-Z]+: \"", line) or line.startswith("%ignore"):
            continue  # words and signs stand in the rules themselves
        else:
            block.append(_rule(line, terminals))
    yield from _fenced(block)


def _fenced(block: list[str]) -> Iterator[str]:
    text = "\n".join(block).strip("\n")
    if text:
        yield f"```text\n{text}\n```\n"


def _rule(line: str, terminals: Mapping[str, str]) -> str:
    if line.startswith("//"):
        return line.replace("//", "#", 1)
    if re.match(r"[A-Z]+: /", line):
        return line
    bare = re.sub(r"\s+-> \w+$", "", line)  # the name of the tree's node
    bare = re.sub(r"^\?", "", bare)

    def spelt(found: re.Match[str]) -> str:
        value = terminals.get(found.group(), "")
        return f"'{value[1:-1]}'" if value.startswith('"') else found.group()

    return re.sub(r"\b[A-Z]{2,}\b", spelt, bare)


def outputs() -> dict[Path, str]:
    """Every made file and its text."""
    return {
        HERE / "grammar.md": grammar_page(grammar_text()),
        HERE / "operators.md": operators_page(),
        HERE / "diagnostics.md": diagnostics_page(),
        HERE / "editors/vscode/syntaxes/graft.tmLanguage.json": json.dumps(
            textmate(), indent=4, ensure_ascii=False
        )
        + "\n",
    }


def main(check: bool) -> int:
    """Write what is out of date, or (with `check`) name it and return 1."""
    stale = [p for p, t in outputs().items() if not p.exists() or p.read_text("utf-8") != t]
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(HERE.parent)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(outputs()[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
