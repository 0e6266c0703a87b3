"""The edit that is suggested is made to the text and run again: the rule then matches, or its nearest miss is nearer.

Every case of the batteries beside this file, written by hand or made by machine. A case that says `no_edit` says why the text
alone cannot help.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import fx

from graftc.diagnostics import GraftError, TextEdit, edited
from graftc.language.check import check
from graftc.language.rules import Rule
from graftc.program.analysis import Analysis
from graftc.program.flat import Flat
from graftc.rewrite.dataflow.select import rule_patterns, select_occurrences
from graftc.rewrite.dataflow.view import graph_ops, program_view
from graftc.rewrite.whynot import Miss, explain
from graftc.rewrite.whynot.dataflow import dataflow_misses
from tests.whynot import test_near_dataflow as by_hand
from tests.whynot import test_near_made as by_machine
from tests.whynot import test_near_sites as on_sites


def mended(rule: Rule, edits: tuple[TextEdit, ...]) -> Rule:
    """The rule after the edits of its text."""
    (found,) = check(edited(rule.span.source, edits)).rules
    return found


def matches(rule: Rule, flat: Flat) -> int:
    return len(select_occurrences(rule, rule_patterns(rule), program_view(flat))[0])


def nearest(rule: Rule, flat: Flat) -> Miss | None:
    return next(iter(dataflow_misses(rule, program_view(flat))), None)


def wrong_in(rule: Rule, flat: Flat, pair: bool, no_edit: str | None = None) -> str | None:
    """What the suggested edit does not do, None where it does it."""
    miss = nearest(rule, flat)
    if miss is None:
        return "no near miss"
    if no_edit is not None or not miss.edits:
        return (
            None if bool(no_edit) is not bool(miss.edits) else f"edits {miss.edits} ({miss.help})"
        )
    try:
        after = mended(rule, miss.edits)
        if matches(after, flat):
            return None
        left = nearest(after, flat)
    except GraftError as error:
        return f"{miss.help}: {error}"
    if pair and left is not None and left.cost < miss.cost:
        return None
    return f"{miss.help}: then {left.text if left else 'nothing'}"


def told(name: str, wrong: str | None) -> Iterator[str]:
    if wrong is not None:
        yield f"{name}: {wrong}"


@pytest.mark.parametrize("pair", [False, True], ids=["single", "in pairs"])
def test_of_dataflow(pair: bool) -> None:
    wrong: list[str] = []
    for case in (c for c in by_hand.CASES if bool(c.get("pair")) is pair):
        flat = by_hand.traced(case["rule"], [case["near"]], bool(case.get("square")))
        said = wrong_in(by_hand.rule(case["rule"]), flat, pair, case.get("no_edit"))
        wrong += told(case["name"], said)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("count", [1, 2], ids=["single", "in pairs"])
def test_of_what_a_machine_made(count: int) -> None:
    wrong: list[str] = []
    edits = total = 0
    for name in by_machine.RULES:
        for said, graph, _ in by_machine.mutated(name, count, seed=0):
            rule, flat = by_hand.rule(name), graph_ops(graph)
            miss = nearest(rule, flat)
            total += 1
            if miss is not None and miss.edits:
                edits += 1
                wrong += told(said, wrong_in(rule, flat, count == 2))
    assert not wrong, "\n".join(wrong)
    assert edits >= 0.95 * total, f"only {edits} of {total} carry an edit"


def counted(case: dict[str, Any], analysis: Analysis, text: str) -> tuple[int, bool, Miss | None]:
    """How many places a rule selects, whether `plan` takes it, and its nearest miss."""
    (found,) = explain(check(text), analysis)
    return len(found.selected), not found.problems, next(iter(found.misses), None)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "in pairs"])
def test_on_sites(pair: bool, models: dict[str, Analysis]) -> None:
    wrong: list[str] = []
    for case in (c for c in on_sites.CASES if bool(c.get("pair")) is pair):
        analysis = models[case["model"]]
        text = on_sites.text_of(case)
        _, _, miss = counted(case, analysis, text)
        assert miss is not None, case["name"]
        if "no_edit" in case or not miss.edits:
            if bool(miss.edits) is ("no_edit" in case):
                wrong.append(f"{case['name']}: edits {miss.edits}, {miss.help}")
            continue
        source = miss.edits[0].span.source
        try:
            after = edited(source, miss.edits).text
            count, whole, left = counted(case, analysis, after)
        except GraftError as error:
            wrong.append(f"{case['name']}: {miss.help}: {error}")
            continue
        nearer = pair and left is not None and left.cost < miss.cost
        if not (count and whole) and not nearer:
            wrong.append(
                f"{case['name']}: {miss.help}: {count} selected, then {left.text if left else ''}"
            )
    assert not wrong, "\n".join(wrong)


def test_a_graph_is_not_changed_by_asking() -> None:
    graph: fx.Graph = by_machine.base("gelu")
    before = str(graph)
    list(dataflow_misses(by_hand.rule("gelu"), program_view(graph_ops(graph))))
    assert str(graph) == before
