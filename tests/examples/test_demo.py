"""The demo and its table: what a row costs, how figures are written, and the whole path once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import graftc.verbs as verbs

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
OTHERS = ("classifier", "data", "frechet", "model", "train")
TABLE = ("table_text", "table_rows", "table_score", "table")
# The plan counts an operator's gating as the paper does; the analysis counts no element-wise work.
GATING = 5e-3

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The table's modules, imported as its scripts import one another, and forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in TABLE})
    finally:
        sys.path.remove(str(FOLDER))
        for name in (*OTHERS, *TABLE):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """The mission's two edits, built without data."""
    folder = tmp_path_factory.mktemp("build") / "both"
    return verbs.compile(FOLDER / "hyena_and_pairs.graft", f"{FOLDER / 'model.py'}:teacher", folder)


def test_pretraining_is_read_from_the_log(example: SimpleNamespace, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 5, "loss": 1.0}\n{"step": 10, "loss": 0.5}\n')
    assert example.table_rows.pretraining_flops(7, log) == 3 * 7 * 10 * 64


def test_a_teacher_pass_is_shared_by_the_sites_of_a_generation(example: SimpleNamespace):
    cost = example.table_rows.distilling_flops
    both = cost(100, {"a": 10, "b": 20}, {"a": 4, "b": 4}, batch=2)
    assert both == 2 * (4 * 100 + 4 * 3 * 10 + 4 * 3 * 20)
    assert both < sum(cost(100, {s: n}, {s: 4}, batch=2) for s, n in (("a", 10), ("b", 20)))


def test_a_site_that_was_exact_costs_no_teacher(example: SimpleNamespace):
    assert example.table_rows.distilling_flops(100, {"a": 10}, {"a": 0}, batch=2) == 0


def test_sites_that_wait_for_others_train_after_them(example: SimpleNamespace, build):
    inner, outer = example.table_rows.generations(build.targets["sites"])
    assert {"blocks.2.attn", "blocks.3.attn", "blocks.0+blocks.1"} <= set(inner)
    assert set(outer) == {"blocks.2+blocks.3", "blocks.4+blocks.5"}


def test_a_pair_costs_both_its_blocks_and_the_merge(example: SimpleNamespace, build):
    found = example.table_rows.site_flops(build)
    steps = {e["site"]: e["flops"]["after"] for e in build.plan["edits"]}
    assert found["blocks.2.attn"] == pytest.approx(steps["blocks.2.attn"], rel=GATING)
    assert found["blocks.2+blocks.3"] > 2 * found["blocks.2.attn"] + steps["blocks.2+blocks.3"]


def test_the_plan_s_totals_are_those_of_the_student(example: SimpleNamespace, build):
    inputs = {
        "x": torch.zeros(2, 1, 8, 8),
        "t": torch.zeros(2, dtype=torch.int64),
        "y": torch.zeros(2, dtype=torch.int64),
    }
    import graftc

    found = verbs.inspect(graftc.Model(build.student().eval(), inputs))
    totals = build.plan["totals"]
    assert found.parameters == totals["parameters"]["after"]
    assert found.flops[""] == pytest.approx(totals["flops"]["after"], rel=GATING)


def test_the_controls_match_what_hyena_matches(example: SimpleNamespace):
    files = [FOLDER / "hyena.graft", *(file for file, _ in example.table.CONTROLS)]
    model = f"{FOLDER / 'model.py'}:teacher"
    sites = [[step.edit.name for step in verbs.plan(file, model).steps] for file in files]
    assert sites[0] == [f"blocks.{i}.attn" for i in (1, 3, 5, 7)]
    assert sites[1] == sites[2] == sites[0]


def test_every_file_is_finetuned_on_the_same_terms(example: SimpleNamespace):
    files = [*example.table.GRAFTS, *(file for file, _ in example.table.CONTROLS)]
    assert len({verbs.check(file).finetune.steps for file in files}) == 1
    last = [file.read_text().strip().splitlines()[-1] for file in files]
    assert len(set(last)) == 1


def test_the_files_are_twenty_lines_at_most(example: SimpleNamespace):
    assert all(len(f.read_text().splitlines()) <= 20 for f in example.table.GRAFTS)


def test_a_line_without_a_figure_leaves_its_cell_empty(example: SimpleNamespace):
    text = example.table_text
    assert text.cells(text.Line("real", "real against real", (0.2, 0.4))) == (
        "real against real",
        "0.300 ± 0.141",
        *[""] * 5,
    )


def test_one_seed_has_no_deviation(example: SimpleNamespace):
    line = example.table_text.Line("a", "a", (1.25,))
    assert line.deviation is None
    assert example.table_text.cells(line)[1] == "1.25"


def test_markdown_says_the_protocol_under_the_table(example: SimpleNamespace):
    text = example.table_text
    made = text.markdown(
        [text.Line("a", "teacher", (1.0, 2.0), 0.9, 0.08, 0.03, 10, 20_000)], ["n"]
    )
    head, rule, row, blank, note = made.splitlines()[:5]
    assert head.count("|") == rule.count("|") == row.count("|") == len(text.COLUMNS) + 1
    assert (blank, note) == ("", "n")


def test_the_protocol_tells_all_that_the_score_depends_on(example: SimpleNamespace):
    said = str(example.table.FULL)
    for word in ("2,000 samples", "3 seeds (0, 1, 2)", "15 steps", "no guidance", "same noise"):
        assert word in said


def test_the_committed_table_is_the_full_one():
    results = FOLDER / "results" / "table.json"
    if not results.is_file():
        pytest.skip("no committed table")
    table = json.loads(results.read_text())
    assert "2,000 samples x 3 seeds" in table["protocol"]
    assert [row["key"] for row in table["rows"]][:3] == ["real", "teacher", "teacher/stage 2"]


@pytest.mark.slow
def test_the_quick_demo_ends_with_verified_models(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "demo.py"), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FAIL" not in done.stdout
    for name in ("samples.png", "table.md", "table.json"):
        assert (tmp_path / name).stat().st_size > 0
    for name in ("hyena", "hyena_and_pairs"):
        assert (tmp_path / name / "student.onnx").is_file()
    rows = {row["key"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    stages = ("untrained", "stage 1", "stage 2")
    assert {f"{n}/{s}" for n in ("hyena", "hyena_and_pairs") for s in stages} <= rows
