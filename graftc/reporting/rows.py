"""What a drawing shows, without a picture: the rows of blocks, and what each becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["same", "replaced", "parallel", "gone", "added"]

SHORT = {
    "self_attention": "self-attention",
    "cross_attention": "cross-attention",
    "joint_attention": "joint attention",
    "unknown_attention": "attention (unknown)",
}
_MOST_ROWS = 80
_SHORTEST_RUN = 4


@dataclass(frozen=True)
class Cell:
    """A site of a block: what it says, what became of it, and the legend's number (0: none)."""

    text: str
    kind: Kind = "same"
    mark: int = 0
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A block before and after, or `count` blocks that are alike.

    `lanes`: the blocks that run beside each other in the student; their row comes once, and spans them all.
    `merge`: their merge; of one block that is edited whole, what it becomes. `kind` is the block's own: `gone`, `added`, `parallel`, `replaced` or `same`.
    """

    index: str
    before: tuple[Cell, ...]
    after: tuple[Cell, ...]
    kind: Kind = "same"
    count: int = 1
    mark: int = 0
    merge: str = ""
    lanes: tuple[tuple[str, tuple[Cell, ...]], ...] = ()
    lanes_before: tuple[tuple[Cell, ...], ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Entry:
    """A line of the legend: one edit of one rule, and at how many places."""

    number: int
    kind: Kind
    text: str
    rule: str
    places: int


@dataclass(frozen=True)
class Table:
    """A chain of blocks, or the sites that stand outside all chains (`name` empty)."""

    name: str
    blocks: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Picture:
    """All that is drawn. `edited` is false for a model that is only looked at."""

    tables: tuple[Table, ...]
    legend: tuple[Entry, ...]
    edited: bool


@dataclass
class _Edits:
    """Edits by the path that they change, with their numbers."""

    by_site: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    inserted: dict[str, list[Mapping[str, Any]]] = field(
        default_factory=dict[str, list[Mapping[str, Any]]]
    )
    marks: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    places: dict[int, int] = field(default_factory=dict[int, int])
    kinds: dict[int, Kind] = field(default_factory=dict[int, Kind])

    def mark(self, edit: Mapping[str, Any]) -> int:
        return self.marks[(edit["rule"], _what(edit))]


def picture(chains: Sequence[Mapping[str, Any]], edits: Sequence[Mapping[str, Any]]) -> Picture:
    """Rows and legend from plain data: `overview`'s chains, `plan_dict`'s edits.

    >>> chain = {"name": "blocks", "blocks": [{"path": "blocks.0", "sites": []}]}
    >>> picture([chain], []).tables[0].rows[0].index
    '0'
    """
    known = _read(edits)
    tables = [_chain(c, known) for c in chains]
    outside = _outside(chains, edits, known)
    legend = [
        Entry(number, known.kinds[number], what, rule, known.places[number])
        for (rule, what), number in known.marks.items()
    ]
    if outside:
        tables.append(Table("", len(outside), tuple(outside)))
    return Picture(tuple(tables), tuple(legend), bool(edits))


def _read(edits: Sequence[Mapping[str, Any]]) -> _Edits:
    known = _Edits()
    for edit in edits:
        key = (edit["rule"], _what(edit))
        number = known.marks.setdefault(key, len(known.marks) + 1)
        known.places[number] = known.places.get(number, 0) + 1
        known.kinds[number] = _kind(edit)
        for path in edit["sites"]:
            if edit["edit"] == "insert":
                known.inserted.setdefault(path, []).append(edit)
            else:
                known.by_site.setdefault(path, edit)
    return known


def _kind(edit: Mapping[str, Any]) -> Kind:
    kinds: dict[str, Kind] = {
        "replace": "replaced", "parallel": "parallel", "together": "parallel", "remove": "gone",
        "skip": "gone", "insert": "added",
    }  # fmt: skip
    return kinds.get(str(edit["edit"]), "replaced")


def _what(edit: Mapping[str, Any]) -> str:
    """What it becomes, alike for all its places: no paths in it."""
    if _kind(edit) == "parallel":
        beside = "" if len(edit["sites"]) > 1 else " with a new operator or a copy"
        return f"run in parallel{beside}, merge = {_merge(edit)}"
    if edit["edit"] == "insert":
        operator = str(edit["after"]).partition(" after ")[0]
        return "a copy of the block before it" if operator.startswith("copy(") else operator
    return {
        "remove": "contributes zero",
        "skip": "the identity on the residual stream",
    }.get(str(edit["edit"]), str(edit["after"]))


def _merge(edit: Mapping[str, Any]) -> str:
    return str(edit["after"]).rpartition("merge = ")[2].removesuffix(")")


def _role(role: str) -> str:
    return SHORT.get(role, role.replace("_", " "))


def _inner(block: Mapping[str, Any], known: _Edits) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
    """The sites of a block before and after. An edit below a site shows in the site's cell."""
    before: list[Cell] = []
    after: list[Cell] = []
    for site in block["sites"]:
        path, role = str(site["path"]), _role(str(site["role"]))
        before.append(Cell(role, title=path))
        edit = known.by_site.get(path)
        below = next((e for p, e in known.by_site.items() if p.startswith(path + ".")), None)
        if edit is not None:
            kind = _kind(edit)
            after.append(Cell(_name(edit), kind, known.mark(edit), f"{path}: {edit['after']}"))
        elif below is not None:
            after.append(
                Cell(
                    f"{role}: {_name(below)}",
                    "replaced",
                    known.mark(below),
                    f"{path}: {below['after']}",
                )
            )
        else:
            after.append(Cell(role, title=path))
        for new in known.inserted.get(path, ()):
            after.append(Cell(_name(new), "added", known.mark(new), str(new["after"])))
    return tuple(before), tuple(after)


def _name(edit: Mapping[str, Any]) -> str:
    if edit["edit"] == "remove":
        return "removed"
    if edit["edit"] == "rewrite":
        return "rewritten"
    if _kind(edit) == "parallel":
        return "in parallel"
    return str(edit["after"]).partition("(")[0]


def _short(edit: Mapping[str, Any]) -> str:
    """What a whole block becomes, for its cell."""
    return {
        "skip": "skipped: the stream passes",
        "remove": "removed",
        "parallel": f"beside a new branch, merge = {_merge(edit)}",
    }.get(str(edit["edit"]), str(edit["after"]))


def _chain(chain: Mapping[str, Any], known: _Edits) -> Table:
    rows: list[Row] = []
    index = {str(b["path"]): i for i, b in enumerate(chain["blocks"])}
    done: set[str] = set()
    for i, block in enumerate(chain["blocks"]):
        path = str(block["path"])
        if path in done:
            continue
        edit = known.by_site.get(path)
        before, after = _inner(block, known)
        members = [p for p in edit["sites"] if p in index] if edit else []
        if edit is not None and len(members) > 1:
            done.update(members)
            inner = [_inner(chain["blocks"][index[p]], known) for p in members]
            rows.append(
                Row(
                    ", ".join(str(index[p]) for p in members), before, after, "parallel", len(members),
                    known.mark(edit), _merge(edit),
                    tuple((str(index[p]), a) for p, (_, a) in zip(members, inner, strict=True)),
                    tuple(b for b, _ in inner), f"{edit['site']}: {edit['after']}",
                )
            )  # fmt: skip
        elif edit is not None:
            said = f"{path}: {edit['after']}"
            rows.append(
                Row(
                    str(i),
                    before,
                    after,
                    _kind(edit),
                    1,
                    known.mark(edit),
                    _short(edit),
                    title=said,
                )
            )
        else:
            rows.append(Row(str(i), before, after, title=path))
        for new in known.inserted.get(path, ()):
            cells = before if str(new["after"]).startswith("copy(") else (Cell(_name(new)),)
            rows.append(Row("new", (), cells, "added", 1, known.mark(new), title=str(new["after"])))
    return Table(str(chain["name"]), len(chain["blocks"]), tuple(_shortened(rows)))


def _shortened(rows: list[Row]) -> list[Row]:
    """Runs of rows that are alike become one, in a chain too long to read."""
    if len(rows) <= _MOST_ROWS:
        return rows
    result: list[Row] = []
    at = 0
    while at < len(rows):
        end = at + 1
        while end < len(rows) and _alike(rows[at], rows[end]):
            end += 1
        if end - at >= _SHORTEST_RUN:
            first, last = rows[at], rows[end - 1]
            result.append(
                Row(
                    f"{first.index}..{last.index}",
                    first.before,
                    first.after,
                    first.kind,
                    end - at,
                    first.mark,
                )
            )
        else:
            result += rows[at:end]
        at = end
    return result


def _alike(a: Row, b: Row) -> bool:
    def key(row: Row) -> object:
        cells = (*row.before, *row.after)
        return (row.kind, row.mark, [(c.text, c.kind, c.mark) for c in cells])

    return not a.lanes and not b.lanes and key(a) == key(b)


def _outside(
    chains: Sequence[Mapping[str, Any]], edits: Sequence[Mapping[str, Any]], known: _Edits
) -> list[Row]:
    """Edits of what stands in no chain."""
    blocks = [str(b["path"]) for c in chains for b in c["blocks"]]
    rows: list[Row] = []
    for edit in edits:
        for path in edit["sites"]:
            if not any(path == b or path.startswith(b + ".") for b in blocks):
                after = Cell(_name(edit), _kind(edit), known.mark(edit), str(edit["after"]))
                rows.append(Row("", (Cell(path, title=str(edit["before"])),), (after,), title=path))
    return rows
