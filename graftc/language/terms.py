"""Walking the terms of a dataflow pattern."""

from __future__ import annotations

from collections.abc import Iterator

from graftc.language.rules import (
    EitherTerm,
    ListTerm,
    MaybeTerm,
    NotTerm,
    OpTerm,
    Ref,
    SiteTerm,
    SpreadTerm,
    Term,
)


def inner_terms(term: Term | None) -> tuple[Term, ...]:
    """The terms directly inside a term."""
    match term:
        case OpTerm():
            return (*(a for a in term.args if a is not None), *(t for _, t in term.named))
        case SiteTerm():
            return term.args or ()
        case MaybeTerm() | NotTerm():
            return (term.value,)
        case EitherTerm():
            return term.choices
        case ListTerm():
            return term.items
        case _:
            return ()


def read_names(term: Term | None) -> Iterator[str]:
    """The names that a term reads, sites' among them."""
    match term:
        case Ref(name=name) | SpreadTerm(name=name):
            yield name
        case SiteTerm(binding=binding):
            yield binding
        case _:
            pass
    for inner in inner_terms(term):
        yield from read_names(inner)
