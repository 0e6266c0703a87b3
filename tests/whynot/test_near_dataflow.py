"""Near misses of dataflow patterns: the first line names the right op and the right cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from graftc.language.check import check
from graftc.language.rules import Rule
from graftc.program.flat import Flat
from graftc.rewrite.dataflow.view import graph_ops, program_view
from graftc.rewrite.whynot.dataflow import dataflow_misses

BANK: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("near_dataflow.yaml").read_text(encoding="utf-8")
)
RULES: dict[str, Any] = BANK["rules"]
CASES: list[dict[str, Any]] = BANK["cases"]


def rule(name: str) -> Rule:
    text = RULES[name]
    (found,) = check(
        f"rule r {{\n  match {{\n{text['match']}\n  }}\n  rewrite {{ {text['rewrite']} }}\n}}"
    ).rules
    return found


def values(name: str, square: bool) -> dict[str, torch.Tensor]:
    """What the code reads; `square`: so that a transpose more or less fits."""
    if name in ("attention", "sdpa"):
        h, n, d = (4, 4, 4) if square else (2, 6, 4)
        heads = {k: torch.randn(2, h, n, d) for k in ("q", "k", "v")}
        return {**heads, "m": torch.zeros(2, h, n, n)}
    wide = {f"w{i}": torch.randn(5, 5) for i in (1, 2, 3)}
    return {"x": torch.randn(2, 3, 5), "y": torch.randn(2, 3, 5), **wide, "b1": torch.randn(5), "b2": torch.randn(5)}  # fmt: skip


def traced(name: str, codes: list[str], square: bool) -> Flat:
    """The ops of several pieces of code, one after the other, each with inputs of its own."""
    made = [values(name, square) for _ in codes]
    flat = [t for v in made for t in v.values()]

    def run(*given: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        tensors = iter(given)
        for code, names in zip(codes, made, strict=True):
            scope: dict[str, Any] = {n: next(tensors) for n in names}
            exec(code, {"torch": torch, "F": F}, scope)
            total = total + scope["o"].cos().prod()
        return total

    with torch.no_grad():
        graph = make_fx(run, pre_dispatch=True)(*flat).graph
    return graph_ops(graph)


def first_line(case: dict[str, Any]) -> tuple[str, bool]:
    """The first line, and whether it is about the right op."""
    name, square = case["rule"], bool(case.get("square"))
    good = RULES[name]["good"]
    before = traced(name, [good], square)
    flat = traced(name, [good, case["near"], "o = (x if 'x' in dir() else q).exp()"], square)
    middle = traced(name, [good, case["near"]], square)
    view = program_view(flat)
    misses = dataflow_misses(rule(name), view)
    if not misses:
        return "nothing", False
    inputs = sum(o.kind != "op" for o in flat.ops)
    first = sum(o.kind == "op" for o in before.ops) + inputs
    last = sum(o.kind == "op" for o in middle.ops) + inputs
    ops = {o.node.name: o.index for o in flat.ops}
    at = ops[misses[0].place.partition("`")[2].partition("`")[0]]
    return misses[0].text, first <= at < last


def right(case: dict[str, Any]) -> str | None:
    line, placed = first_line(case)
    if placed and all(s in line for s in case["says"]):
        return None
    return f"{case['name']}: {'' if placed else 'ELSEWHERE '}{line}"


@pytest.mark.parametrize(
    ("pairs", "share"), [(False, 0.95), (True, 0.88)], ids=["single", "in pairs"]
)
def test_the_first_line_is_right(pairs: bool, share: float) -> None:
    cases = [c for c in CASES if bool(c.get("pair")) is pairs]
    wrong = [w for c in cases if (w := right(c)) is not None]
    assert 1 - len(wrong) / len(cases) >= share, "\n".join(wrong)


@pytest.mark.parametrize("name", RULES)
def test_a_match_is_no_near_miss(name: str) -> None:
    flat = traced(name, [RULES[name]["good"]], square=False)
    assert dataflow_misses(rule(name), program_view(flat)) == ()


def test_the_battery_is_large() -> None:
    assert len(CASES) >= 30


def test_a_guard_that_turns_an_occurrence_down() -> None:
    text = RULES["attention"]
    (guarded,) = check(
        f"rule r {{\n  match {{\n{text['match'].replace('0.5', 'c')}\n  }}\n  where c is tensor\n"
        f"  rewrite {{ o = relu(q) }}\n}}"
    ).rules
    (miss,) = dataflow_misses(guarded, program_view(traced("attention", [text["good"]], False)))
    assert "c is not a tensor" in miss.text
    assert miss.note().span is not None
    assert miss.note().span.text.startswith("c is tensor")
