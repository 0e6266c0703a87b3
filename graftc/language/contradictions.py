"""Guards that can never hold together, and guards that always hold: told from the text and from what facts can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from graftc.diagnostics import Diagnostic, Note
from graftc.language.evaluate import shown
from graftc.language.rules import Expr, Fact, Literal_, Operation, Rule, SiteMatch
from graftc.language.vocabulary import FACTS

_LEAST: Mapping[str, float] = {
    **dict.fromkeys(
        ("dim", "tokens", "heads", "kv_heads", "head_dim", "in_features", "out_features", "hidden", "count"), 1.0
    ),
    **dict.fromkeys(("params", "flops", "eps", "ratio", "locality", "influence", "std", "absmax"), 0.0),
    "kurtosis": 1.0,
}  # fmt: skip
"""The least that a fact can be, where that is known."""
_MOST: Mapping[str, float] = {"locality": 1.0, "influence": 2.0}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass
class _Known:
    """What is known of a fact so far: its bounds (`open`: without the bound itself), its value, and who said so."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False
    value: object = None
    truth: bool | None = None
    said: list[Expr] = field(default_factory=list[Expr])


def contradictions(rule: Rule) -> Iterator[Diagnostic]:
    """An error for a guard that cannot hold beside the others, a warning for one that always holds."""
    known: dict[str, _Known] = {}
    for part in _parts(rule.where):
        read = _read(part)
        if read is None:
            continue
        fact, op, value = read
        about = known.setdefault(shown(fact), _fresh(rule, fact))
        always, never = _add(about, fact, op, value)
        if never:
            yield _never(rule, part, about)
            return
        if always and not about.said:
            yield Diagnostic(
                "G413",
                f"`{shown(part)}` always holds",
                span=part.span,
                wanted="a guard that some site does not satisfy",
                help="leave it out",
                severity="warning",
            )
        about.said.append(part)


def _never(rule: Rule, part: Expr, about: _Known) -> Diagnostic:
    notes = tuple(Note(f"it must also hold that {shown(e)}", e.span) for e in about.said[-2:])
    together = " together with the rest of `where`" if notes else ""
    return Diagnostic(
        "G412",
        f"`{shown(part)}` never holds{together}: rule `{rule.name}` can never match",
        span=part.span,
        wanted="a guard that a site can satisfy",
        notes=notes,
        help="write `or` if one of them is enough" if notes else None,
    )


def _parts(where: Expr | None) -> Iterator[Expr]:
    if isinstance(where, Operation) and where.op == "and":
        for part in where.args:
            yield from _parts(part)
    elif where is not None:
        yield where


def _read(part: Expr) -> tuple[Fact, str, object] | None:
    """(fact, comparison, constant) of a guard of that form; a truth is `== true`."""
    if isinstance(part, Fact):
        return part, "==", True
    if not isinstance(part, Operation):
        return None
    if part.op == "not" and isinstance(part.args[0], Fact):
        return part.args[0], "==", False
    if part.op not in ("==", *_MIRRORED):
        return None
    left, right = part.args
    op = part.op
    if isinstance(left, Literal_) and isinstance(right, Fact):
        left, right, op = right, left, _MIRRORED.get(op, op)
    if isinstance(left, Fact) and isinstance(right, Literal_):
        return left, op, right.value
    return None


def _fresh(rule: Rule, fact: Fact) -> _Known:
    found = _Known(_LEAST.get(fact.name, float("-inf")), _MOST.get(fact.name, float("inf")))
    if fact.name == "kind":
        role = next(
            (
                m.role
                for m in rule.matches
                if isinstance(m, SiteMatch) and m.binding == fact.binding
            ),
            None,
        )
        if role is not None and role.endswith("_attention"):
            found.value = role.removesuffix("_attention")
    return found


def _add(about: _Known, fact: Fact, op: str, value: object) -> tuple[bool, bool]:
    """Takes a guard in; (whether it held anyway, whether nothing is left)."""
    if isinstance(value, bool):
        always, never = about.truth is value, about.truth is (not value)
        about.truth = value
        return always, never
    if isinstance(value, str):
        always, never = about.value == value, about.value not in (None, value)
        about.value = value
        return always, never
    if not isinstance(value, (int, float)):
        return False, False
    whole = FACTS[fact.name].type == "int" if fact.name in FACTS else False
    before = (about.low, about.low_open, about.high, about.high_open)
    if op in (">", ">=", "=="):
        _raise(about, value, op == ">", whole)
    if op in ("<", "<=", "=="):
        _lower(about, value, op == "<", whole)
    empty = about.low > about.high or (
        about.low == about.high and (about.low_open or about.high_open)
    )
    return before == (about.low, about.low_open, about.high, about.high_open), empty


def _raise(about: _Known, value: float, is_open: bool, whole: bool) -> None:
    if whole and is_open:
        value, is_open = int(value // 1) + 1, False
    if (value, is_open) > (about.low, about.low_open):
        about.low, about.low_open = value, is_open


def _lower(about: _Known, value: float, is_open: bool, whole: bool) -> None:
    if whole and is_open:
        value, is_open = int(-(-value // 1)) - 1, False
    if (value, not is_open) < (about.high, not about.high_open):
        about.high, about.high_open = value, is_open
