"""`repeat(measure)` of edits of sites: round after round on what is left, and the measure falls in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftc
from graftc.compiler import compile_model, undone
from graftc.diagnostics import GraftError
from graftc.emit.package import load_package
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.program import Program
from graftc.rewrite.plan import make_plan
from graftc.rewrite.repeat import run_repeated, undo_rounds
from tests.rewrite.models import tiny


def head(text: str, of: str, words: str = "") -> str:
    return f"rule prune repeat({of}) {words} {{\n  {text}\n}}"


def weights(program: Program) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in program.root.named_parameters()}


def test_the_last_block_goes_until_no_chain_is_left(digits: Analysis) -> None:
    (rule,) = check(head("match b = block in blocks last 1\n  skip b", "params")).rules
    student, rounds = run_repeated([rule], digits.program)
    assert len(rounds) > 3
    assert all(r.after < r.before for r in rounds)
    assert [r.before for r in rounds[1:]] == [r.after for r in rounds[:-1]]
    assert len({r.edits[0].name for r in rounds}) == len(rounds), "another block in each round"
    back = undo_rounds(student, rounds)
    assert weights(back) == weights(digits.program)


def test_a_rule_that_takes_all_at_once_runs_once(digits: Analysis) -> None:
    plan = make_plan(check(head("match a = mlp in blocks odd\n  remove a", "ops")), digits)
    (line,) = (c for c in plan.checks if "prune" in c)
    assert "ran 1 time, 4 matches: ops " in line


def test_a_measure_that_does_not_fall_is_told(digits: Analysis) -> None:
    rules = check(head("match a = mlp in blocks odd\n  remove a", "count(softmax)"))
    with pytest.raises(GraftError) as caught:
        make_plan(rules, digits)
    (found,) = caught.value.diagnostics
    assert found.code == "G389"
    assert found.span is not None
    assert found.span.text == "repeat(count(softmax))"


@pytest.mark.parametrize(
    ("text", "words", "code", "span"),
    [
        ("match a = mlp in blocks odd\n  remove a\n  distill l2", "", "G440", "distill l2"),
        ("match a = mlp in blocks odd\n  remove a", "exact", "G441", "repeat(ops)"),
    ],
)
def test_what_cannot_repeat(text: str, words: str, code: str, span: str) -> None:
    with pytest.raises(GraftError) as caught:
        check(head(text, "ops", words))
    assert [(d.code, d.span.text if d.span else "") for d in caught.value.diagnostics] == [
        (code, span)
    ]


HALVED = """rule narrow repeat(params) {
    match   m = mlp
    where   hidden(m) > 8
    replace m with mlp(ratio = ratio(m) * 0.5)
    init    keep_top(m, by = magnitude)
}"""


def test_new_weights_are_the_next_rounds_own() -> None:
    """Half of the neurons go in each round, the weakest of what is left: what the whole keeps is the strongest 8."""
    model = tiny()
    compiled = compile_model(check(HALVED), model)
    assert [len(r.edits) for r in compiled.rounds] == [4, 4]  # 32, 16, 8 neurons
    assert [r.before for r in compiled.rounds[1:]] == [r.after for r in compiled.rounds[:-1]]
    assert all(r.after < r.before for r in compiled.rounds)
    count = sum(p.numel() for p in compiled.student.root.parameters())
    assert count == compiled.plan.parameters[1] == compiled.rounds[-1].after
    before, after = (dict(p.root.named_parameters()) for p in (compiled.teacher, compiled.student))
    up = next(p for n, p in after.items() if n.startswith("blocks.1.mlp") and p.shape == (8, 16))
    rows = {tuple(r.tolist()) for r in before["blocks.1.mlp.up.weight"]}
    assert len(rows) == 32
    assert all(tuple(r.tolist()) in rows for r in up)
    given = [model.inputs[p.name] for p in compiled.teacher.inputs]
    assert torch.isfinite(compiled.student.root(*given)[0]).all()
    said = "\n".join(compiled.checks)
    assert "ran 2 times, 8 matches: params" in said
    assert "keep_top(m, magnitude)" in said.replace("by = ", "")
    back = undone(compiled).root.state_dict()
    original = compiled.teacher.root.state_dict()
    assert list(back) == list(original)
    assert all(torch.equal(back[n], original[n]) for n in original)


def test_the_written_package_runs_without_the_rounds(tmp_path: Path) -> None:
    model = tiny()
    path = tmp_path / "r.graft"
    path.write_text(HALVED)
    build = graftc.compile(path, model, tmp_path / "build")
    made = compile_model(check(path), model).student.root
    x = model.inputs["x"]
    with torch.no_grad():
        assert torch.equal(load_package(build.path / "student")(x), made(x)[0])


@pytest.mark.parametrize(
    "text",
    [
        "match b = block in blocks odd\n  insert copy(b) after b",
        "match a, b = each pair of blocks all\n  replace with parallel(a, b, merge = linear)",
    ],
)
def test_an_edit_that_never_makes_less_is_refused(text: str) -> None:
    rules = check(head(text, "params"))
    with pytest.raises(GraftError) as caught:
        make_plan(rules, analyse(capture(tiny())))
    assert [d.code for d in caught.value.diagnostics] == ["G389"]


def test_what_is_not_fitted_is_told() -> None:
    text = HALVED.replace("    init    keep_top(m, by = magnitude)\n", "")
    (note,) = make_plan(check(text), analyse(capture(tiny()))).notes
    assert (note.code, note.severity) == ("G447", "note")


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("match a = mlp\n  replace a with one of {mlp(ratio = 2), keep}", "replace a with one of {mlp(ratio = 2), keep}"),
        ("match a = mlp\n  replace a with mlp(ratio = 2)\n  train inserted", "repeat(params)"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_round_after_round(text: str, span: str) -> None:
    with pytest.raises(GraftError) as caught:
        check(head(text, "params"))
    (found,) = caught.value.diagnostics
    assert found.code == "G446"
    assert found.span is not None
    assert found.span.text == span
