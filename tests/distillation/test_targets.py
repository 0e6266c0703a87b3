"""targets.yaml: a round trip, an order, and a diagnostic for each thing that can be wrong."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml

from graftc.diagnostics import GraftError
from graftc.distillation import from_dict, load_targets, save_targets, to_dict
from graftc.distillation.targets import Lora, Stage2
from tests.distillation import tiny

BOTH = tiny.targets(tiny.attention_site(3, solve=True), tiny.pair_site(after=("blocks.3.attn",)))


@pytest.mark.parametrize("train", ["all", "inserted", Lora(4, 8.0)])
def test_a_file_read_back_is_what_was_written(tmp_path, train):
    made = tiny.targets(*BOTH.sites, stage2=Stage2(data=0.25, halve_lr_at=(3, 5), train=train))
    save_targets(made, tmp_path)
    assert load_targets(tmp_path) == made
    assert yaml.safe_load((tmp_path / "targets.yaml").read_text()) == to_dict(made)


def test_inner_sites_come_before_outer_ones():
    assert [[s.name for s in group] for group in BOTH.generations()] == [
        ["blocks.3.attn"],
        ["blocks.2+blocks.3"],
    ]


def changed(*path, to):
    data = copy.deepcopy(to_dict(BOTH))
    at = data
    for key in path[:-1]:
        at = at[key]
    if to is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return data


@pytest.mark.parametrize(
    ("data", "code", "told"),
    [
        ([], "G502", "table"),
        (changed("version", to=3), "G503", "wanted: 1 or 2"),
        (changed("version", to=KeyError), "G502", "`version` is missing"),
        (changed("site", to=[]), "G502", "write `sites`"),
        (changed("sites", 0, "los", to={}), "G502", "write `loss`"),
        (changed("sites", 0, "loss", "kind", to="l3"), "G502", "l1, l2, huber"),
        (changed("sites", 0, "loss", "weight", to="1e-4"), "G502", "write 1.0e-4"),
        (changed("sites", 0, "budget", "batch", to=0), "G502", "at least 1"),
        (changed("sites", 0, "budget", "steps", to=True), "G502", "whole number"),
        (changed("sites", 0, "trainable", to=[]), "G502", "something to train"),
        (changed("sites", 1, "name", to="blocks.3.attn"), "G502", "two sites"),
        (changed("sites", 1, "after", to=["blocks.3.atn"]), "G502", "write `blocks.3.attn`"),
        (changed("sites", 0, "after", to=["blocks.2+blocks.3"]), "G502", "cycle"),
        (changed("sites", 0, "teacher", "output", to="blocks.2.attn"), "G502", "not inside"),
        (changed("sites", 0, "teacher", "inputs", to=[]), "G502", "at least one input"),
        (changed("sites", 1, "student", "inputs", 1, "name", to="d"), "G502", "`d`"),
        (changed("stage2", "data", to=25), "G502", "share"),
        (changed("stage2", "ema", to=1), "G502", "below 1"),
        (changed("stage2", "train", to="some"), "G502", "inserted"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(data, code, told):
    with pytest.raises(GraftError) as raised:
        from_dict(data)
    assert raised.value.diagnostics[0].code == code
    assert raised.value.diagnostics[0].site.startswith("targets.yaml")
    assert told in str(raised.value)


def test_a_missing_and_a_broken_file_are_told(tmp_path):
    with pytest.raises(GraftError, match="no such file"):
        load_targets(tmp_path)
    (tmp_path / "targets.yaml").write_text("a: [")
    with pytest.raises(GraftError, match="not YAML"):
        load_targets(tmp_path)


DOCS = Path(__file__).parents[2] / "docs" / "targets.md"


def blocks_of_yaml():
    return [
        yaml.safe_load(text)
        for text in re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    ]


def names_of(value):
    """The keys of plain data, below one another; of a list, of its first row."""
    if isinstance(value, dict):
        return {key: names_of(inner) for key, inner in value.items()}
    return names_of(value[0]) if isinstance(value, list) and value else None


def test_the_example_of_the_docs_is_valid_and_has_every_field():
    shown, candidates, *_ = blocks_of_yaml()
    shown["sites"][0].update(candidates)
    shown["sites"][0]["candidates"].sort(key=lambda row: -len(row))  # the one that says most first
    full = to_dict(from_dict(shown))
    written = names_of(full)
    site, told = written["sites"], names_of(shown)["sites"]
    for cut in ("teacher", "student"):  # said in the text below
        site[cut].pop("gate")
    for name in ("blocks", "sweeps"):  # of `alternating`, said in the text below
        site["pending"].pop(name)
    for row in (site, told):
        row.pop("arguments")  # free: the operator's own
    for name in ("arguments", "definition", "init", "sample", "pending"):  # "as of a site"
        for row in (site, told):
            row["candidates"].pop(name, None)
    assert told == site
    assert names_of(shown)["stage2"] == written["stage2"]
    assert names_of(shown)["inputs"] == written["inputs"]
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"`{name}" in text for name in ("gate: true", "blocks", "sweeps"))
