"""Measured selectors, from the text of a rule to the plan and the build; what they say without data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.cli.main import main
from graftc.compiler import compile_model, undone
from graftc.diagnostics import Diagnostic, GraftError
from graftc.emit.files import read_yaml
from graftc.language.check import check
from graftc.measures import Measuring
from graftc.program.analysis import Analysis
from graftc.program.measured import MeasuredOn, SiteMeasures, Statistics
from graftc.program.model import Model
from graftc.rewrite.measured import families
from graftc.rewrite.plan import make_plan
from graftc.rewrite.plan_text import plan_dict
from graftc.rewrite.whynot import explain
from tests.measures.test_measure import AsItIs, Net, analysed, vectors

ROOT = Path(__file__).parents[2]
DIGITS = [
    "-m", f"{ROOT}/examples/digits/model.py:teacher",
    "-d", f"{ROOT}/examples/digits/data.py:images",
]  # fmt: skip


@pytest.fixture(scope="module")
def bare() -> Analysis:
    return analysed(Net(runs=6))


@pytest.fixture
def known(bare: Analysis) -> Analysis:
    """Six blocks with figures that can be read off: block i has influence FIGURES[i], and so on."""

    def at(path: str) -> SiteMeasures:
        block = next((int(p) for p in path.split(".") if p.isdigit()), 0)
        if path.endswith(".self_attention"):
            figures = Statistics(0.0, 1.0, 2.0, 10.0 + block)
            share = torch.tensor([0.1, 0.2 + block / 10, 1.0])
            return SiteMeasures(within=share, statistics=figures, why={})
        figures = Statistics(0.0, 1.0, 2.0, 100.0 - block)
        return SiteMeasures(influence=FIGURES[block], statistics=figures, why={})

    sites = tuple(replace(s, measured=at(s.path)) for s in bare.sites)
    said = MeasuredOn(64, 0, "data.py:images", "ddpm", ("locality", "influence", "statistics"))
    return replace(bare, sites=sites, measured=said)


FIGURES = (0.5, 0.2, 0.1, 0.2, 0.9, 0.2)


def chosen(analysis: Analysis, clause: str, where: str = "", edit: str = "") -> list[int]:
    """The blocks that a rule takes."""
    name = clause.split()[0]
    text = f"rule r {{\n match {clause}\n {where}\n {edit or f'remove {name}'}\n}}"
    made = make_plan(check(text), analysis)
    return sorted(int(e.name.split(".")[1]) for e in made.edits)


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        ("bottom 1 by influence", [2]),
        ("bottom 3 by influence", [1, 2, 3]),  # 1, 3 and 5 are equal: the lower ones
        ("top 3 by influence", [0, 1, 4]),  # and so from above
        ("top 25% by influence", [0, 4]),  # 1.5 rounds up
        ("bottom 50% by influence except {1}", [2, 3]),
    ],
)
def test_ranks_round_half_up_and_ties_go_to_the_lower(
    known: Analysis, blocks: str, wanted: list[int]
) -> None:
    assert chosen(known, f"b = block in blocks {blocks}", edit="skip b") == wanted


def test_what_a_block_set_is_ranked_by(known: Analysis) -> None:
    assert chosen(known, "a = self_attention in blocks top 2 by locality(band = 1)") == [4, 5]
    # An mlp has no locality: it is that of its block's attention. Kurtosis is each site's own.
    assert chosen(known, "m = mlp in blocks top 2 by locality(band = 1)") == [4, 5]
    assert chosen(known, "a = self_attention in blocks top 2 by kurtosis") == [4, 5]
    assert chosen(known, "m = mlp in blocks top 2 by kurtosis") == [0, 1]


def test_guards(known: Analysis) -> None:
    every = "a = self_attention in blocks all"
    assert chosen(known, every, "where locality(a, band = 1) > 0.55") == [4, 5]
    assert chosen(known, every, "where locality(a, band = 0) > 0.05 and kurtosis(a) <= 11") == [0, 1]  # fmt: skip
    assert chosen(known, every, "where locality(a, band = 999) == 1") == list(range(6))


def test_the_plan_lists_what_was_chosen_and_what_was_not(known: Analysis) -> None:
    text = "rule r {\n match b = block in blocks top 3 by influence\n where kurtosis(b) < 100\n skip b\n}"
    said = plan_dict(make_plan(check(text), known))["measured"]
    assert (said["samples"], said["seed"], said["data"], said["task"]) == (64, 0, "data.py:images", "ddpm")  # fmt: skip
    by_set, by_guard = said["selectors"]
    assert by_set["selector"] == "top 3 by influence"
    assert {p["path"]: p["value"] for p in by_set["chosen"]} == {"blocks.0": 0.5, "blocks.1": 0.2, "blocks.4": 0.9}  # fmt: skip
    assert [p["path"] for p in by_set["not_chosen"]] == ["blocks.2", "blocks.3", "blocks.5"]
    assert by_guard["selector"] == "kurtosis(b)"
    assert [p["path"] for p in by_guard["chosen"]] == ["blocks.1", "blocks.4"]
    assert by_guard["not_chosen"] == [{"path": "blocks.0", "value": 100.0}]


def test_explain_says_how_far_a_place_is(known: Analysis) -> None:
    text = "rule r {\n match a = self_attention in blocks all\n where locality(a, band = 1) > 0.55\n remove a\n}"
    (found,) = explain(check(text), known)
    assert found.selected == ("blocks.4.attn.self_attention", "blocks.5.attn.self_attention")
    (near,) = explain(check(text), known, at="blocks.3.attn.self_attention")
    assert near.misses[0].changes[0].text == "locality(a, band = 1) is 0.5, wanted > 0.55"
    text = text.replace("> 0.55", "> 0.99")
    (found,) = explain(check(text), known)
    fix = (found.help or "").removeprefix("write `").partition("`")[0]
    repaired = text.replace("locality(a, band = 1) > 0.99", fix)
    assert repaired != text
    assert make_plan(check(repaired), known).steps  # rounded so that the place is in


def problem(text: str, analysis: Analysis) -> Diagnostic:
    with pytest.raises(GraftError) as raised:
        make_plan(check(text), analysis)
    return raised.value.diagnostics[0]


def test_without_data_it_asks_for_data(bare: Analysis) -> None:
    for text in (
        "rule r {\n match b = block in blocks bottom 2 by influence\n skip b\n}",
        "rule r {\n match a = self_attention\n where locality(a, band = 4) > 0.5\n remove a\n}",
    ):
        assert families(check(text))
        found = problem(text, bare)
        assert found.code == "G135"
        assert found.span is not None
        assert "-d DATA" in (found.help or "")
        (said,) = explain(check(text), bare)
        assert [d.code for d in said.problems] == ["G135"]


def test_more_blocks_than_there_are(known: Analysis) -> None:
    text = "rule r {\n match b = block in blocks bottom 9 by influence\n skip b\n}"
    found = problem(text, known)
    assert (found.code, found.help) == ("G131", "write `bottom 6`, or `all`")


def test_a_repeated_rule_cannot_measure() -> None:
    text = (
        "rule r exact repeat(count(add)) {\n match { y = add(a, b) }\n match s = mlp\n"
        " where absmax(s) > 1\n rewrite { y = add(b, a) }\n}"
    )
    with pytest.raises(GraftError, match="G490"):
        families(check(text))


def measuring(data: Any) -> Measuring:
    return Measuring(data, AsItIs(), samples=4)


def test_a_site_without_an_attention_op_is_named() -> None:
    net = Net("linear", runs=2)
    inputs = {"x": torch.zeros(2, 12, 16), "mask": torch.ones(2, 12)}
    text = "rule r {\n match a = self_attention\n where locality(a, band = 4) > 0.5\n remove a\n}"
    with pytest.raises(GraftError) as raised:
        compile_model(check(text), Model(net, inputs), measuring=measuring(vectors()))
    (found,) = raised.value.diagnostics
    assert found.code == "G488"
    assert (found.site or "").startswith("blocks.0.attn")
    assert "no softmax" in found.message
    text = text.replace("a = self_attention", 'a = module "blocks.*.mlp"')
    with pytest.raises(GraftError, match="holds no attention op"):
        compile_model(check(text), Model(net, inputs), measuring=measuring(vectors()))


@torch.library.custom_op("graftc_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class Opaque(Net):
    def __init__(self) -> None:
        super().__init__(runs=2)
        for block in self.blocks:
            block.attn.forward = lambda x, mask, own=block.attn: own.out(
                attend(
                    *(p.contiguous() for p in own.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4))
                ).transpose(1, 2).flatten(2)
            )  # fmt: skip


def test_an_opaque_op_is_named() -> None:
    inputs = {"x": torch.zeros(2, 12, 16), "mask": torch.ones(2, 12)}
    text = "rule r {\n match a = self_attention in blocks top 1 by locality(band = 4)\n remove a\n}"
    with pytest.raises(GraftError) as raised:
        compile_model(check(text), Model(Opaque(), inputs), measuring=measuring(vectors()))
    (found,) = raised.value.diagnostics
    assert found.code == "G488"
    assert "`attend`, which graftc cannot see into" in found.message


def test_drop_blocks_of_the_corpus_keeps_its_contract(tmp_path: Path) -> None:
    """On a model of its kind, a Llama: six blocks of least influence go, the others are untouched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    weak = {1, 2, 3, 5, 6, 7}
    with torch.no_grad():
        for index, layer in enumerate(module.model.layers):
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.mul_(0.01 if index in weak else 10)
    words = [{"input_ids": torch.randint(64, (12,))} for _ in range(8)]
    model = Model(module, {"input_ids": torch.stack([w["input_ids"] for w in words[:2]])})
    rules = check(ROOT / "tests/corpus/drop_blocks.graft")
    compiled = compile_model(rules, model, measuring=Measuring(words, AsItIs(), 8, cache=tmp_path))
    assert {e.name for e in compiled.plan.edits} == {f"model.layers.{i}" for i in weak}
    with torch.no_grad():
        given = model.inputs["input_ids"]
        found = compiled.student.root(given)[0]
        kept = [m for i, m in enumerate(module.model.layers) if i not in weak]
        module.model.layers = nn.ModuleList(kept)
        torch.testing.assert_close(found, module(given).logits)
    back = undone(compiled).root.state_dict()
    original = compiled.teacher.root.state_dict()
    assert list(back) == list(original)
    assert all(torch.equal(back[n], original[n]) for n in original)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


DROP = str(ROOT / "tests/corpus/drop_blocks.graft")


def test_on_the_digits_from_plan_to_build(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quick = ["--samples", "8", "--cache", str(tmp_path / "kept")]
    code, out, err = run(capsys, "plan", DROP, *DIGITS, *quick)
    assert (code, err) == (0, "")
    assert "measured on 8 samples of " in out
    assert "rule `prune`, `bottom 6 by influence`:" in out
    assert "  chosen: " in out
    assert "  not chosen: blocks.0 " in out
    into = tmp_path / "build"
    assert run(capsys, "compile", DROP, *DIGITS, *quick, "-o", str(into))[0] == 0
    kept = read_yaml(into / "plan.yaml")
    assert kept["measured"]["read_from_cache"] == ["influence"]
    (selector,) = kept["measured"]["selectors"]
    picked = [p["path"] for p in selector["chosen"]]
    assert len(picked) == 6
    assert sorted(e["site"] for e in kept["edits"]) == picked


SMALL = """
from tests.measures.test_measure import AsItIs, Net, vectors
import graftc, torch

def model():
    inputs = {"x": torch.zeros(2, 12, 16), "mask": torch.ones(2, 12)}
    return graftc.Model(Net(runs=2), inputs)
"""


def test_on_the_command_line_without_data_or_task_or_samples(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, rule = tmp_path / "small.py", tmp_path / "one.graft"
    file.write_text(SMALL)
    rule.write_text("rule r {\n match b = block in blocks bottom 1 by influence\n skip b\n}")
    given = ["plan", str(rule), "-m", f"{file}:model", "--cache", str(tmp_path / "kept")]
    code, _, err = run(capsys, *given)
    assert code == 1
    assert "error[G135]" in err
    assert "give `-d DATA`" in err
    data = ["-d", f"{file}:vectors"]
    code, _, err = run(capsys, *given, *data)
    assert (code, "error[G231]" in err) == (1, True)
    code, _, err = run(capsys, *given, *data, "-t", f"{file}:AsItIs", "--samples", "0")
    assert (code, "error[G493]" in err) == (1, True)
    code, out, _ = run(capsys, *given, *data, "-t", f"{file}:AsItIs", "--samples", "3")
    assert (code, "measured on 3 samples" in out) == (0, True)


def test_inspect_on_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text(SMALL)
    given = ["inspect", f"{file}:model", "-d", f"{file}:vectors", "-t", f"{file}:AsItIs"]
    given += ["--cache", str(tmp_path / "kept")]
    code, out, err = run(capsys, *given)
    assert (code, err) == (0, "")
    assert "measured on 5 samples" in out
    head = next(line for line in out.splitlines() if "kurtosis" in line)
    assert head.split() == ["site", "|i-j|<=4", "influence", "mean", "std", "absmax", "kurtosis"]
    code, out, _ = run(capsys, *given, "--format", "json")
    said = json.loads(out)
    assert said["measured_on"]["samples"] == 5
    assert said["measured_on"]["read_from_cache"] == ["locality", "influence", "statistics"]
    sites = {s["path"]: s.get("measured", {}) for s in said["sites"]}
    assert 0 < sites["blocks.1.attn.self_attention"]["locality"]["4"] < 1
    assert 0 < sites["blocks.1"]["influence"] < 1
    assert sites["blocks.1.mlp"]["kurtosis"] > 1


def test_check_needs_no_torch() -> None:
    code = (
        "import sys\nfrom graftc.language.check import check\n"
        f"check({DROP!r})\nassert 'torch' not in sys.modules"
    )

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
