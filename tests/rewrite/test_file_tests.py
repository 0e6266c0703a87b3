"""`graftc test FILE`: a rule on a small graph that the file writes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import graftc
from graftc.cli.main import main
from graftc.diagnostics import Diagnostic, GraftError
from graftc.rewrite.dataflow.proof import relative_difference
from graftc.rewrite.filetest import TestResult

STD = Path(__file__).parents[2] / "rules" / "std"
PAGE = (STD.parents[1] / "docs" / "language.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```graft\n(.*?)```", PAGE, re.DOTALL)
RULE = """
rule to_silu exact {
    match   { y = x * sigmoid(x) }
    rewrite { y = silu(x) }
}
"""
TEST = """
test gate of to_silu {
    before { y = x * sigmoid(x) }
    inputs x: tensor[2, 8]
    after { y = silu(x) }
    expect 1
}
"""


def only(text: str) -> TestResult:
    (result,) = graftc.test_files([text])
    return result


def problem(text: str) -> Diagnostic:
    (found,) = only(text).problems
    return found


def refused(text: str) -> Diagnostic:
    """The mistake of a file that is wrong before any test runs."""
    with pytest.raises(GraftError) as error:
        graftc.check(text)
    return error.value.diagnostics[0]


@pytest.mark.parametrize(
    "file", sorted(f.name for f in STD.glob("*.graft") if "\ntest " in f.read_text())
)
def test_the_shipped_rules_pass_their_own_tests(file: str) -> None:
    results = graftc.test_files([STD / file])
    assert [r.problems for r in results] == [()] * len(results)


@pytest.mark.parametrize("text", [e for e in EXAMPLES if "\ntest " in e])
def test_the_tests_on_the_page_pass(text: str) -> None:
    results = graftc.test_files([text])
    assert [r.problems for r in results] == [()] * len(results)


def test_every_shipped_rule_on_ops_has_a_test() -> None:
    rules = graftc.check(STD / "exact.graft")
    assert {t.rule.name for t in rules.tests} == {r.name for r in rules.rules}


def test_a_right_test_passes_and_says_what_it_compared() -> None:
    result = only(RULE + TEST)
    assert (result.passed, result.matches) == (True, 1)
    said = "\n".join(result.checks)
    assert "the graph is as in `after`, 1 op" in said
    assert "limit 1e-10" in said  # float64
    assert "limit 1e-05" in said


def test_a_wrong_count_fails_at_expect() -> None:
    found = problem(RULE + TEST.replace("expect 1", "expect 2"))
    assert (found.code, found.wanted, found.found) == ("G474", "2 matches", "1 match")
    assert found.span is not None
    assert found.span.text == "expect 2"


def test_a_rule_that_leaks_is_counted_as_no_match_and_says_why() -> None:
    before = "p = sigmoid(x)\n y = x * p\n return y, p"
    text = RULE + TEST.replace("y = x * sigmoid(x)", before).replace("after { y = silu(x) }", "")
    found = problem(text)
    assert (found.wanted, found.found) == ("1 match", "0 matches")
    assert "also returned by the model" in found.notes[0].message


def test_without_expect_a_match_is_wanted() -> None:
    text = TEST.replace("y = x * sigmoid(x)", "y = exp(x)").replace("expect 1", "")
    codes = [p.code for p in only(RULE + text).problems]
    assert codes == ["G474", "G475"]


def test_another_graph_than_after_fails_with_both_lines() -> None:
    found = problem(RULE + TEST.replace("silu(x) }\n    expect", "relu(x) }\n    expect"))
    assert found.code == "G475"
    assert (found.wanted, found.found) == ("v0 = relu(x)", "v0 = silu(x)")
    assert found.span is not None
    assert found.span.text.startswith("after")


def test_an_argument_that_differs_is_another_graph() -> None:
    text = """
    rule tanh_form { match { y = relu(x) }
        rewrite { y = gelu(x, tanh) } }
    test form of tanh_form { before { y = relu(x) }
        inputs x: tensor[2, 8]
        after { y = gelu(x) } }
    """
    assert problem(text).code == "G475"


def test_wrong_numbers_in_a_rule_that_says_exact() -> None:
    text = RULE.replace("silu(x) }", "relu(x) }") + TEST.replace("silu(x) }", "relu(x) }")
    found = problem(text)
    assert found.code == "G388"
    assert found.wanted == "a relative difference of at most 1e-10 in float64"
    assert found.notes[-1].message == "in test `gate`"


def test_numbers_are_not_run_where_the_rule_does_not_say_exact() -> None:
    text = RULE.replace("silu(x) }", "relu(x) }") + TEST.replace("silu(x) }", "relu(x) }")
    result = only(text.replace("to_silu exact", "to_silu"))
    assert result.passed
    assert result.checks[-1] == "numbers NOT RUN: rule `to_silu` does not say exact"


def test_outputs_that_are_whole_numbers_are_said_not_to_be_compared() -> None:
    text = TEST.replace("x * sigmoid(x) }", "aten.argmax(x * sigmoid(x)) }").replace(
        "after { y = silu(x) }", ""
    )
    result = only(RULE + text)
    assert result.passed
    assert result.checks[-1] == "the graph's outputs: NOT RUN (none is a floating-point tensor)"


def test_a_rewrite_that_gives_no_number_is_not_exact() -> None:
    """NaN compares as neither more nor less: it must not count as no difference."""
    text = RULE.replace("silu(x) }", "silu(x) + log(abs(x) * -1) * 0 }")
    found = problem(text + TEST.replace("after { y = silu(x) }", ""))
    assert (found.code, found.found) == ("G388", "inf on random inputs")
    number, none = torch.ones(2), torch.full((2,), torch.nan)
    assert relative_difference(number, none) == float("inf")
    assert relative_difference(none, none) == 0


def test_new_weights_go_by_the_rules_names() -> None:
    text = """
    use merged_linears from std.exact
    test two of merged_linears {
        before { y = linear(linear(x, first), second) }
        inputs n = 6, x: tensor[2, 8], first: weight[n, 8], second: weight[4, n]
        after { y = linear(x, w) }
        expect 1
    }
    """
    assert only(text).problems == ()
    assert problem(text.replace("linear(x, w)", "linear(x, w, b)")).code == "G477"


def test_a_rule_that_repeats_counts_all_its_rounds() -> None:
    text = """
    use no_ops from std.exact
    test rounds of no_ops {
        before { y = exp(neg(neg(neg(neg(x))))) }
        inputs x: tensor[2, 8]
        after { y = exp(x) }
    }
    """
    result = only(text)
    assert result.problems == ()
    assert result.matches == 2


def test_an_op_that_does_not_take_its_values_is_named() -> None:
    text = TEST.replace("y = x * sigmoid(x)", "y = matmul(x, x)")
    found = problem(RULE + text)
    assert found.code == "G473"
    assert found.found == "[2, 8], [2, 8]"
    assert found.span is not None
    assert found.span.text == "matmul(x, x)"


@pytest.mark.parametrize(
    ("old", "new", "code", "at"),
    [
        ("of to_silu", "of to_silo", "G111", "to_silo"),
        ("y = x * sigmoid(x) }", "y = x * sigmoid(z) }", "G105", "z"),
        ("tensor[2, 8]", "tensr[2, 8]", "G121", "tensr"),
        ("tensor[2, 8]", "tensor[n, 8]", "G471", "n"),
        ("tensor[2, 8]", "tensor[2, 0]", "G471", "0"),
        ("tensor[2, 8]", "tensor[99999, 99999]", "G122", "tensor[99999, 99999]"),
        ("tensor[2, 8]", "tensor", "G471", "tensor"),
        ("tensor[2, 8]", "tensor[2, 8], z: tensor[2]", "G114", "z: tensor[2]"),
        ("tensor[2, 8]", "tensor[2, 8], x: tensor[2]", "G113", "x"),
        ("{ y = silu(x) }", "{ z = silu(x) }", "G472", "after { z = silu(x) }"),
        ("{ y = silu(x) }", "{ y = sillu(x) }", "G371", "sillu"),
        ("{ y = x * sigmoid(x) }", "{ }", "G472", "before { }"),
    ],
)  # fmt: skip
def test_a_wrong_test_is_told_by_check_where_it_is(old: str, new: str, code: str, at: str) -> None:
    found = refused(RULE + TEST.replace(old, new))
    assert found.span is not None
    assert (found.code, found.span.text) == (code, at.split(":")[0] if code == "G114" else at)


def test_two_tests_have_two_names() -> None:
    assert refused(RULE + TEST + TEST).code == "G115"


def test_a_rule_on_sites_has_no_graph_to_be_tried_on() -> None:
    text = "rule thin { match b = block in blocks odd\n skip b }\n" + TEST.replace(
        "to_silu", "thin"
    )
    found = refused(text)
    assert (found.code, found.help) == (
        "G470",
        "try a rule on sites with `graftc plan FILE -m MODEL`",
    )


def test_a_file_without_tests_is_no_success() -> None:
    with pytest.raises(GraftError, match="G478"):
        graftc.test_files([RULE])


@pytest.mark.parametrize(("expect", "code"), [("expect 1", 0), ("expect 3", 1)])
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expect: str, code: int
) -> None:
    file = tmp_path / "rules.graft"
    file.write_text(RULE + TEST.replace("expect 1", expect))
    with pytest.raises(SystemExit) as left:
        main(["test", str(file)])
    out, err = capsys.readouterr()
    assert left.value.code == code
    assert out.startswith(f"{'FAIL' if code else 'PASS'} {file}: gate of to_silu\n")
    assert out.endswith(f"{1 - code} passed, {code} failed\n")
    assert ("rules.graft:11:5" in err) is bool(code)


@pytest.mark.parametrize(("expect", "code"), [("expect 1", 0), ("expect 3", 1)])
def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], expect: str, code: int) -> None:
    file = tmp_path / "rules.graft"
    file.write_text(RULE + TEST.replace("expect 1", expect))
    with pytest.raises(SystemExit) as left:
        main(["test", str(file), "--format", "json"])
    said = json.loads(capsys.readouterr().out)
    assert left.value.code == code
    (test,) = said["tests"]
    assert (test["test"], test["rule"], test["passed"], test["matches"]) == (
        "gate",
        "to_silu",
        not code,
        1,
    )
    assert [d["code"] for d in said["diagnostics"]] == ["G474"] * code
