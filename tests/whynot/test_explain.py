"""`graftc explain` as its user meets it, and the same notes where `expect` is not met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graftc
from graftc.cli.main import main
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.program.analysis import Analysis
from graftc.rewrite.match import match

ROOT = Path(__file__).parents[2]
MODEL = f"{ROOT}/examples/digits/model.py:teacher"
TEXT = """rule few {
    match   a = self_attention in blocks 1..5
    where   heads(a) == 8
    replace a with hyena_x(kernel = 4)
}
rule fine {
    match   m = mlp in blocks odd
    replace m with mlp(ratio = 3)
}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.graft"
    path.write_text(TEXT)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_every_rule_is_explained(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, out, _ = run(capsys, "explain", str(file), "-m", MODEL)
    assert code == 0
    few, _, fine = out.partition("rule `fine`")
    assert "heads(a) is 4, wanted == 8" in few
    assert f"{file}:3:13" in few, "the place in the rule"
    assert "examples/digits/model.py:" in few, "the model's own line"
    assert few.count("help: ") == 1
    assert "write `heads(a) == 4`" in few
    assert "selects 4 places: blocks.1.mlp" in fine
    assert "help" not in fine, "a rule that does what it says needs no advice"


def test_a_rule_that_no_model_can_match_is_told_as_such(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Near misses in a model would send its writer the wrong way."""
    file = tmp_path / "a.graft"
    file.write_text("rule never { match { y = relu(x * 1) }\nrewrite { y = relu(x) }\n}\n")
    code, out, _ = run(capsys, "explain", str(file), "-m", MODEL)
    assert code == 0
    assert "error[G443]: rule `never` can never match what it says" in out
    assert "near misses" not in out


def test_at_one_place(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, out, _ = run(capsys, "explain", str(file), "-m", MODEL, "few", "--at", "blocks.0.mlp")
    assert code == 0
    assert "does not select blocks.0.mlp" in out
    assert "is mlp, wanted self_attention" in out
    assert "block 0 is not in the set" in out
    _, out, _ = run(capsys, "explain", str(file), "-m", MODEL, "fine", "--at", "blocks.1.mlp")
    assert "selects 1 place: blocks.1.mlp" in out


def test_names_that_are_not_there(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, _, err = run(capsys, "explain", str(file), "-m", MODEL, "fiew")
    assert code == 1
    assert "write `few`" in err
    code, _, err = run(capsys, "explain", str(file), "-m", MODEL, "--at", "blocks.1.mpl")
    assert code == 1
    assert '"blocks.1.mlp"' in err


def test_as_data(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, out, _ = run(capsys, "explain", str(file), "-m", MODEL, "--format", "json")
    assert code == 0
    few, fine = json.loads(out)["rules"]
    assert few["misses"][0]["place"] == "blocks.1.attn"
    assert few["misses"][0]["changes"][0]["kind"] == "guard"
    assert few["misses"][0]["changes"][0]["span"]["line"] == 3
    assert [p["code"] for p in few["problems"]] == ["G332"]
    assert len(fine["selected"]) == 4


def test_the_same_notes_where_expect_is_not_met(digits: Analysis) -> None:
    (rule, _) = check(TEXT).rules
    (explained, _) = graftc.explain(TEXT, MODEL)
    with pytest.raises(GraftError) as caught:
        match(rule, digits)
    (found,) = caught.value.diagnostics
    assert found.notes[0].message.split(": ")[1] == explained.misses[0].text.split(": ")[1]
    assert found.help == explained.help


def test_nearest_first(digits: Analysis) -> None:
    (few, _) = graftc.explain(TEXT, MODEL)
    inside = [m.cost for m in few.misses if not m.aside]
    assert inside == sorted(inside)
    del digits


def test_warnings_are_printed_at_check_and_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.graft"
    file.write_text(TEXT.replace("heads(a) == 8", "heads(a) >= 1"))
    code, _, err = run(capsys, "check", str(file))
    assert code == 0
    assert "warning[G413]" in err
    code, _, err = run(capsys, "plan", str(file), "-m", MODEL)
    assert code == 0
    assert "warning[G413]" in err
    assert f"{file}:3:13" in err


def test_an_mlp_on_vectors_says_that_the_role_is_for_tokens() -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    model = graftc.Model(nn.Sequential(layer), {"input": torch.zeros(3, 4)})
    (explained,) = graftc.explain("rule r {\n match m = mlp\n remove m\n}", model)
    assert "it works on [batch, features]" in explained.misses[0].changes[0].text
