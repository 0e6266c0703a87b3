"""`replace a with one of {…}`: every candidate is resolved, priced and built; the first is the student's."""

from __future__ import annotations

from graftc.language.rules import OneOf
from graftc.rewrite.edits import Edit, Place, new_module


def one_of_edit(place: Place, edit: OneOf) -> Edit:
    """The edit at a match; where `keep` stands first the student keeps the site."""
    site = place.match.bindings[edit.binding]
    candidates = tuple(
        None if call is None else new_module(place, call, site, site.path)
        for call in edit.candidates
    )
    first = candidates[0]
    return Edit(
        "replace",
        place.rule,
        place.match,
        (site,),
        site.graph,
        () if first is None else (first,),
        candidates=candidates,
    )
