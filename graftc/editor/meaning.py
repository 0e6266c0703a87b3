"""What the word at a place means: the one answer behind hover and go to definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftc.editor.page import Page, Place
from graftc.language import syntax as s
from graftc.language.tokens import Token
from graftc.language.vocabulary import (
    ALL_PARTS,
    BLOCK_PARTS,
    DISTILL,
    DROPS,
    FACTS,
    FINETUNE,
    FUNCTIONS,
    LOSSES,
    POLICIES,
    ROLES,
)
from graftc.operators.specs import MERGES, SPECS

Kind = Literal[
    "argument", "binding", "drop", "fact", "file", "keyword", "loss", "merge", "operator", "option",
    "part", "policy", "role", "rule", "setting", "slot", "structure", "used", "written",
]  # fmt: skip

STRUCTURE = {
    "parallel": "`parallel(r1, …, rk, merge = sum | linear | lerp(start = s))`: all branches read r1's input.",
    "copy": "`copy(b)`: a copy of a site, with its weights.",
    "keep": "Among candidates: the site as it is.",
    "lora": "`lora(rank = 64, alpha = 16)`: low-rank adapters, merged at the end.",
    **{f: f"`{f}(…)`: of numbers." for f in FUNCTIONS},
}


@dataclass(frozen=True)
class Meaning:
    """A word and what it is; `owner` is the operator of an argument or slot, the item of an option."""

    kind: Kind
    name: str
    token: Token
    owner: str = ""


def meaning_at(page: Page, offset: int) -> Meaning | None:
    """What the word at an offset means, or None where it says nothing.

    >>> page = Page.read("a.graft", "rule r {\\n  match a = mlp in blocks odd\\n  remove a\\n}")
    >>> [meaning_at(page, page.source.text.index(w)).kind for w in ("match", "mlp", "a\\n}")]
    ['keyword', 'role', 'binding']
    """
    at = page.token_at(offset)
    if at is None:
        return None
    token = page.tokens[at]
    use = _use_around(page, token)
    if token.type == "STRING":
        return Meaning("file", token.value[1:-1], token) if use else None
    if not (token.value[:1].isalpha() or token.value[:1] == "_"):
        return None
    if token.keyword and token.type != "NAME":
        return Meaning("keyword", token.value, token)
    place = page.place(token.start)
    kind, owner = _kind(page, token, place, _following(page, at), use)
    return Meaning(kind, token.value, token, owner) if kind else None


def _following(page: Page, at: int) -> str:
    rest = (t for t in page.tokens[at + 1 :] if t.type not in ("NL", "COMMENT"))
    after = next(rest, None)
    return after.value if after else ""


def _use_around(page: Page, token: Token) -> s.Use | None:
    inside = (i for i in page.document.items if isinstance(i, s.Use))
    return next((u for u in inside if u.span.start <= token.start < u.span.end), None)


def _kind(
    page: Page, token: Token, place: Place, following: str, use: s.Use | None
) -> tuple[Kind | None, str]:
    name, last = token.value, place.last
    if use is not None:
        in_names = use.names and any(n.span.start == token.start for n in use.names)
        return ("used" if in_names else "file"), ""
    if last == "." and name in (*ALL_PARTS, *BLOCK_PARTS):
        return "part", place.before[-2].value if len(place.before) > 1 else ""
    if last == "rule" or (last in ("after", "of", ",") and name in page.rules and not place.clause):
        return "rule", ""
    if last == "set" or (last == "operator" and name in page.operators):
        return ("setting" if last == "set" else "written"), ""
    if following == "=" and place.calls:
        return "argument", place.calls[-1].head
    if following == "=" and place.item == "finetune" and name in FINETUNE:
        return "option", "finetune"
    if following == "=" and place.clause == "init":
        return "slot", page.replaced_by(token.start) or ""
    if place.clause == "distill" and (name in LOSSES or name in DISTILL):
        return ("loss", "") if name in LOSSES else ("option", "distill")
    if place.clause == "drop" and name in DROPS:
        return "drop", ""
    if place.name == "merge" and name in MERGES:
        return "merge", ""
    if following == "(":
        return _called(page, name, place), ""
    return _plain(page, name, token, place), ""


def _called(page: Page, name: str, place: Place) -> Kind | None:
    if place.clause == "init" and name in POLICIES:
        return "policy"
    if place.clause != "where" and not place.calls and name in page.operators:
        return "written"
    if name in SPECS and place.clause != "where" and (name not in FACTS or not place.calls):
        return "operator"
    if name in FACTS:
        return "fact"
    if name in page.operators:
        return "written"
    if name in STRUCTURE:
        return "structure"
    return "policy" if name in POLICIES else None


def _plain(page: Page, name: str, token: Token, place: Place) -> Kind | None:
    if name in page.bindings(token.start):
        return "binding"
    if name in page.settings:
        return "setting"
    if place.clause == "match" and name in ROLES:
        return "role"
    if place.clause == "init" or place.name == "init":
        return "policy" if name in POLICIES else None
    if place.last == "by" and name in FACTS:
        return "fact"
    if name in STRUCTURE:
        return "structure"
    return "operator" if name in SPECS and not place.clause else None
