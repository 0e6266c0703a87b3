"""Long lines, broken where a person would: at the outermost brackets, one item a line if need be."""

from __future__ import annotations

from itertools import pairwise

WIDTH = 96
_OPEN, _CLOSE = "([{", ")]}"


def wrap(line: str, indent: int = 0) -> list[str]:
    """`line` with `indent` spaces, in pieces of at most `WIDTH` columns where it has brackets.

    >>> print("\\n".join(wrap("x = function(" + ", ".join(["a_long_argument"] * 5) + ", last=1)")))
    x = function(
        a_long_argument, a_long_argument, a_long_argument, a_long_argument, a_long_argument, last=1
    )
    """
    pad = " " * indent
    if len(pad) + len(line) <= WIDTH:
        return [pad + line]
    if line.startswith("return ") and len(_pieces(line)) > 1:
        line = f"return ({line[7:]})"
    left, equals, right = line.partition(" = ")
    span = _widest(line)
    opening = span[0] + 1 if span is not None else len(line)
    if equals and len(_pieces(left)) > 1 and len(pad) + opening > WIDTH:
        return _unpacked(left, right, indent)
    operators = _operators(line)
    if operators and (span is None or not _ends_with(line, span)):
        return _in_brackets(line, operators, indent)
    if span is None:
        return [pad + line]
    start, end = span
    inner = line[start + 1 : end].strip().removesuffix(",")
    head, tail = pad + line[: start + 1], pad + line[end:]
    pieces = _pieces(inner)
    if len(pieces) == 1:
        return [head, *_broken_words(pieces[0], indent + 4), tail]
    if indent + 4 + len(inner) <= WIDTH:
        return [head, " " * (indent + 4) + inner, tail]
    return [head, *[part for piece in pieces for part in wrap(f"{piece},", indent + 4)], tail]


def _unpacked(left: str, right: str, indent: int) -> list[str]:
    """`(a, b) = …` with many names: the names on lines of their own, as full as they go."""
    pad = " " * (indent + 4)
    lines = [pad]
    for name in _pieces(left):
        if len(lines[-1]) + len(name) + 2 > WIDTH:
            lines.append(pad)
        lines[-1] += f"{name}, "
    last = wrap(f") = {right}", indent)
    return [" " * indent + "(", *[line.rstrip() for line in lines], *last]


def _operators(line: str) -> list[int]:
    """Where the loosest infix operators of the right-hand side stand, outside of brackets."""
    begin = line.find(" = ") + 3 if " = " in line else 7 if line.startswith("return ") else 0
    outer = [i for i in _outer(line) if i >= begin]
    for words in ((" + ", " - "), (" * ", " / ", " @ ")):
        found = [i for i in outer if line.startswith(words, i)]
        if found:
            return found
    return []


def _ends_with(line: str, span: tuple[int, int]) -> bool:
    """Whether a line is one call to its end, and so breaks well inside of it."""
    return span[1] >= len(line) - 1 and not _operators(line)


def _in_brackets(line: str, operators: list[int], indent: int) -> list[str]:
    """A long sum or product, its terms on lines of their own."""
    pad = " " * indent
    begin = line.find(" = ") + 3 if " = " in line else 7 if line.startswith("return ") else 0
    comma = "," if line.endswith(",") else ""
    body = line[begin:].removesuffix(",")
    if indent + 4 + len(body) <= WIDTH:
        return [f"{pad}{line[:begin]}(", " " * (indent + 4) + body, f"{pad}){comma}"]
    cuts = [0, *[i - begin for i in operators], len(body)]
    terms = [body[a:b].strip() for a, b in pairwise(cuts)]
    lines = [part for term in terms for part in wrap(term, indent + 4)]
    return [f"{pad}{line[:begin]}(", *lines, f"{pad}){comma}"]


def _broken_words(text: str, indent: int) -> list[str]:
    """A comprehension or a choice: broken before `if`, `else` and `for` at its own level."""
    if indent + len(text) <= WIDTH:
        return [" " * indent + text]
    cuts = [i for i in _outer(text) for w in (" if ", " for ", " else ") if text.startswith(w, i)]
    if not cuts:
        return wrap(text, indent)
    bounds = [0, *cuts, len(text)]
    parts = [text[a:b].strip() for a, b in pairwise(bounds)]
    lines: list[str] = []
    current = ""
    for part in parts:
        starts = part.startswith(("else ", "for "))
        if current and (starts or indent + len(current) + len(part) + 1 > WIDTH):
            lines += wrap(current, indent)
            current = part
        else:
            current = f"{current} {part}".strip()
    return [*lines, *wrap(current, indent)]


def _outer(text: str) -> list[int]:
    """Positions that are in no bracket and no string."""
    found: list[int] = []
    depth, quote = 0, ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "\"'":
            quote = c
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE:
            depth -= 1
        if depth == 0 and not quote:
            found.append(i)
    return found


def _widest(line: str) -> tuple[int, int] | None:
    """The outermost bracket pair that holds the most text."""
    best: tuple[int, int] | None = None
    outer = set(_outer(line))
    start = None
    for i, c in enumerate(line):
        if i not in outer and i - 1 in outer | {-1} and c in _OPEN:
            start = i
        elif start is not None and i in outer and c in _CLOSE:
            if i - start > 1 and (best is None or i - start > best[1] - best[0]):
                best = (start, i)
            start = None
    return best


def _pieces(text: str) -> list[str]:
    """Items at the outermost commas."""
    cuts = [i for i in _outer(text) if text[i] == ","]
    bounds = [-1, *cuts, len(text)]
    parts = [text[a + 1 : b].strip() for a, b in pairwise(bounds)]
    return [p for p in parts if p]


def quoted(text: str) -> str:
    """Double quotes for the single ones that `ast.unparse` writes."""
    if "'" not in text or '"' in text:
        return text
    return text.replace("'", '"')
