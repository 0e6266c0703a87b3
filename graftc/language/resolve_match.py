"""`match` clauses: what each name is bound to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from graftc.diagnostics import Instead, Note, fail
from graftc.language import syntax as s
from graftc.language.expressions import whole
from graftc.language.python_names import python_match
from graftc.language.resolve_blocks import blocks_of, check_groups
from graftc.language.resolve_dataflow import dataflow_match
from graftc.language.rules import Blocks, GroupMatch, Match, SequenceMatch, SiteMatch
from graftc.language.scope import Binding, Scope, already, listed, suggest
from graftc.language.vocabulary import HOLDS, ROLES, covers


@dataclass(frozen=True)
class Matched:
    """A rule's patterns. `groups`: how many groups there are, where the text alone tells."""

    matches: tuple[Match, ...]
    groups: int | None = None


def matches_of(
    scope: Scope, clauses: tuple[s.MatchSites | s.MatchDataflow | s.MatchPython, ...]
) -> Matched:
    """The patterns of a rule, their names bound in `scope`. Mistakes go to its log."""
    found: list[Match] = []
    groups: int | None = None
    for clause in clauses:
        if isinstance(clause, s.MatchDataflow):
            with scope.log.attempt():
                found.append(dataflow_match(scope, clause))
        elif isinstance(clause, s.MatchPython):
            with scope.log.attempt():
                found.append(python_match(scope, clause))
        else:
            for item in clause.items:
                _bind(scope, item)
                with scope.log.attempt():
                    match, groups_here = _item(scope, item)
                    found.append(match)
                    groups = groups_here or groups
    return Matched(tuple(found), groups)


def _bind(scope: Scope, item: s.MatchItem) -> None:
    """Binds the names even where the pattern is wrong, so that their uses are no further errors."""
    role: str | None = None
    if item.kind in ("pair", "run"):
        role = "block"
    elif item.kind == "role" and isinstance(item.what, s.Name) and item.what.text in ROLES:
        role = item.what.text
    for at, name in enumerate(item.names):
        first = scope.bindings.get(name.text)
        if first is not None:
            scope.log.add(
                already(
                    "G113",
                    f"`{name.text}` is bound twice",
                    name.span,
                    first.span,
                    "give it another name",
                )
            )
            continue
        if item.kind == "then" and at < len(item.roles):
            role = item.roles[at].text if item.roles[at].text in ROLES else None
        scope.bindings[name.text] = Binding(name.text, name.span, role)


def _item(scope: Scope, item: s.MatchItem) -> tuple[Match, int | None]:
    names = tuple(n.text for n in item.names)
    if item.kind in ("pair", "run"):
        return _group(scope, item, names)
    if item.kind == "then":
        roles = tuple(_role(role) for role in item.roles)
        if len(names) != len(item.roles):
            _count(item, len(item.roles), "sites in sequence")
        chosen = blocks_of(scope, item.choice) if item.choice else None
        inside = tuple(_role(w) for w in item.within)
        return SequenceMatch(names, roles, item.span, within=inside, blocks=chosen), None
    if len(names) != 1:
        fail(
            "G120",
            "one pattern binds one name",
            span=item.names[1].span,
            wanted="one name, or `each pair of blocks …`",
            found=f"{len(names)} names",
            help=f"write a `match` line for `{names[1]}`",
        )
    blocks: Blocks | None = None
    with scope.log.attempt():
        blocks = blocks_of(scope, item.choice) if item.choice else None
    within = tuple(_role(w) for w in item.within)
    assert item.what is not None
    around = item.within[0].span.to(item.within[-1].span) if item.within else None
    found = SiteMatch(names[0], item.span, within=within, blocks=blocks,
                      what_span=item.what.span, within_span=around)  # fmt: skip
    if isinstance(item.what, s.Name):
        role = _role(item.what)
        _check_nesting((item.what, *item.within))
        return replace(found, role=role), None
    _check_name(item.what, item.kind)
    text = item.what.value
    if item.kind == "path":
        return replace(found, path=text), None
    return replace(found, class_name=text), None


def _role(name: s.Name) -> str:
    if name.text not in ROLES:
        fail(
            "G101",
            f"unknown role `{name.text}`",
            span=name.span,
            wanted=listed(ROLES),
            found=f"`{name.text}`",
            help=suggest(name.text, ROLES)
            or f'name it by path: `module "…"`, or by class: `class "{name.text}"`',
        )
    return name.text


def _check_nesting(roles: tuple[s.Name, ...]) -> None:
    """`linear in mlp` can be; `mlp in linear` never."""
    for inner, outer in pairwise(roles):
        if not any(covers(inner.text, r) for r in HOLDS.get(outer.text, ())):
            fail(
                "G128",
                f"this can never match: no `{inner.text}` lies in a `{outer.text}`",
                span=inner.span.to(outer.span),
                wanted=f"a role that lies in it: {listed(HOLDS.get(outer.text, ()))}"
                if outer.text in HOLDS
                else f"`{inner.text}` in a block, an attention or an mlp",
                help=Instead(f"{outer.text} in {inner.text}")
                if outer.text in HOLDS.get(inner.text, ())
                else None,
            )


def _check_name(text: s.Text, kind: str) -> None:
    value = text.value
    bad = (
        not value.strip()
        or any(c.isspace() for c in value)
        or value.startswith(".")
        or value.endswith(".")
    )
    if bad or ".." in value or "***" in value or (kind == "class" and "*" in value):
        example = '"transformer_blocks.*.ff"' if kind == "path" else '"package.module.Class"'
        fail(
            "G128",
            "this can never match: no "
            + ("module has such a path" if kind == "path" else "class has such a name"),
            span=text.span,
            wanted=f"a name such as {example}",
            found=f'"{value}"',
            help="`*` stands for what is between two dots, `**` crosses them"
            if kind == "path"
            else 'a class has no `*`; to match many, name them by path: `module "…"`',
        )


def _group(scope: Scope, item: s.MatchItem, names: tuple[str, ...]) -> tuple[Match, int | None]:
    size = 2 if item.length is None else whole(scope, item.length, "a run", 2)
    assert item.choice is not None
    blocks = blocks_of(scope, item.choice)
    if len(names) != size:
        _count(item, size, "blocks of a pair" if item.kind == "pair" else "blocks of the run")
    return GroupMatch(names, blocks, item.span), check_groups(blocks, size)


def _count(item: s.MatchItem, wanted: int, what: str) -> None:
    letters = ", ".join("abcdefghijklmnop"[:wanted]) if wanted <= 16 else "…"
    fail(
        "G120",
        f"{wanted} names for the {what} are wanted",
        span=item.names[0].span.to(item.names[-1].span),
        wanted=f"{wanted} names",
        found=f"{len(item.names)}",
        help=f"write `{letters} = …`",
    )


def read_names(node: s.Expr) -> list[s.Name]:
    """The names of values that a dataflow expression reads: not operators, not options' keys."""
    found: list[s.Name] = []
    waiting: list[object] = [node]
    while waiting:
        at = waiting.pop()
        match at:
            case s.Path(names=names):
                found.append(names[0])
            case s.Spread(name=name):
                found.append(name)
            case s.Call(arguments=arguments):
                waiting += [a.value if isinstance(a, s.Named) else a for a in arguments]
            case s.Binary(left=left, right=right):
                waiting += [left, right]
            case s.Unary(operand=operand):
                waiting.append(operand)
            case s.Maybe(value=value) | s.IsKind(value=value) | s.HasShape(value=value):
                waiting.append(value)
            case s.Alternatives(choices=choices):
                waiting += choices
            case s.ListOf(items=items):
                waiting += items
            case _:
                pass
    return found


def report_unused(scope: Scope) -> None:
    """A name that is bound and never used is a misspelling, or a rule that does less than it says."""
    for binding in scope.bindings.values():
        if not binding.used and not binding.name.startswith("_"):
            with scope.log.attempt():
                fail(
                    "G114",
                    f"`{binding.name}` is bound and never used",
                    span=binding.span,
                    help=f"use it, or call it `_{binding.name}` to say that it only has to be there",
                    notes=[Note("names are used by `where`, the edit and `init`")],
                )
