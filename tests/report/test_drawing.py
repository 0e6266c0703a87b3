"""The drawing of chains and edits: what stands in it, and that its texts keep to their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from drawings import EVERYTHING, HYENA, chain, edit, pairs
from typer.testing import CliRunner

from graftc.cli.commands import app
from graftc.reporting.drawing import draw
from graftc.reporting.rows import picture

SVG = "{http://www.w3.org/2000/svg}"
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "a model of 28 blocks": ([chain(28)], []),
    "pairs and Hyena in 28 blocks": ([chain(28)], [*HYENA, *pairs(28)]),
    "every kind of edit in 60 blocks": ([chain(60, cross=True)], EVERYTHING),
    "two chains": ([chain(19, "double"), chain(38, "single")], []),
    "1,000 blocks": ([chain(1000)], HYENA),
    "no chain": ([], [edit("replace", "mlp(ratio = 2)", "head", before="mlp")]),
    "long names": (
        [chain(4, "a.very.long.name.of.a.chain.that.goes.on")],
        [edit("replace", "x" * 300 + "()", "a.very.long.name.of.a.chain.that.goes.on.1.attn", rule="r" * 200)],
    ),
    "signs that XML does not like": (
        [chain(2)], [edit("replace", 'op(a = "<&>")', "blocks.0.attn", rule="a<b")]
    ),
}  # fmt: skip


def texts(svg: str) -> list[tuple[str, float, float, float, float]]:
    """Each text and the box that it takes: left, top, right, bottom. A little wider than it is drawn."""
    found: list[tuple[str, float, float, float, float]] = []
    for node in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        size, said = float(node.attrib["font-size"]), node.text or ""
        width = len(said) * size * 0.62
        x, y = float(node.attrib["x"]), float(node.attrib["y"])
        shift = {"end": width, "middle": width / 2}.get(node.attrib.get("text-anchor", ""), 0.0)
        found.append((said, x - shift, y - 0.76 * size, x - shift + width, y + 0.22 * size))
    return found


@pytest.mark.parametrize("name", CASES)
def test_no_text_overlaps_another_or_leaves_the_picture(name: str) -> None:
    svg = draw(*CASES[name], "title")
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [t for t in texts(svg) if t[0]]
    for said, left, top, right, bottom in boxes:
        assert left >= 0, said
        assert top >= 0, said
        assert right <= width, said
        assert bottom <= height, said
    boxes.sort(key=lambda t: t[2])
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 : i + 40]:
            apart = (
                one[3] <= other[1] or other[3] <= one[1] or one[4] <= other[2] or other[4] <= one[2]
            )
            assert apart, (one, other)


def shown(name: str) -> list[str]:
    return [t[0] for t in texts(draw(*CASES[name], "title"))]


def test_a_model_alone_has_one_column_and_no_legend() -> None:
    said = shown("a model of 28 blocks")
    assert said.count("self-attention") == 28
    assert "before" not in said
    assert "legend" not in said
    assert {str(i) for i in range(28)} <= set(said)


def test_pairs_stand_beside_each_other_with_their_merge() -> None:
    said = shown("pairs and Hyena in 28 blocks")
    assert said.count("merge = linear") == 14
    assert "0, 1" in said
    assert "8: hyena_x · mlp" in said
    assert "9: self-attention · mlp" in said
    assert any("hyena_x(kernel = 4, causal = true), rule hyena, 7 places" in t for t in said)
    assert any("merge = linear, rule pairs, 14 places" in t for t in said)


def test_every_kind_of_edit_is_marked_and_in_the_legend() -> None:
    chains, edits = CASES["every kind of edit in 60 blocks"]
    made = picture(chains, edits)
    assert len(made.legend) == 10
    assert sum(e.places for e in made.legend) == len(edits)
    said = shown("every kind of edit in 60 blocks")
    for text in (
        "removed",
        "skipped: the stream passes",
        "new",
        "depthwise_conv",
        "mlp: low_rank",
        "final_norm",
    ):
        assert text in said
    assert "merge = sum" in said
    rows = {r.index: r for r in made.tables[0].rows}
    assert rows["5"].kind == "gone"
    assert rows["new"].kind == "added"
    assert [c.text for c in rows["21"].after if c.kind == "parallel"] == ["in parallel"] * 2
    assert rows["24, 25, 26"].count == 3
    numbers = {e.number for e in made.legend}
    assert {str(n) for n in numbers} <= set(said)


def test_every_block_is_there_once() -> None:
    made = picture(*CASES["every kind of edit in 60 blocks"])
    found = [i for r in made.tables[0].rows for i in r.index.split(", ") if r.kind != "added"]
    assert found == [str(i) for i in range(60)]


def test_a_long_chain_is_shortened_and_says_so() -> None:
    made = picture(*CASES["1,000 blocks"])
    assert sum(r.count for r in made.tables[0].rows) == 1000
    assert len(made.tables[0].rows) < 40
    assert "21..999" in shown("1,000 blocks")
    assert any("1000 blocks" in t for t in shown("1,000 blocks"))


def test_kinds_differ_without_colour() -> None:
    """In a grey print: a dashed, hatched box is gone; a number tells which edit it is."""
    root = ElementTree.fromstring(draw(*CASES["every kind of edit in 60 blocks"]))
    dashed = [r for r in root.iter(f"{SVG}rect") if "stroke-dasharray" in r.attrib]
    assert all(r.attrib["fill"] == "url(#gone)" for r in dashed)
    assert len(dashed) == 2 + 2  # two edits, two lines of the legend
    dark = [t for t in root.iter(f"{SVG}text") if t.attrib["fill"] in ("#1b1f24", "#57606a")]
    white = [t for t in root.iter(f"{SVG}text") if t.attrib["fill"] == "#ffffff"]
    assert all((t.text or "").isdigit() for t in white)  # only numbers, on a dark badge
    assert len(dark) + len(white) == len(list(root.iter(f"{SVG}text")))


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "r.graft").write_text(
        "rule cut {\n    match   m = mlp in blocks odd\n    remove  m\n    expect  1\n}\n"
    )
    model, out = f"{tmp_path / 'm.py'}:model", tmp_path / "out.svg"
    done = CliRunner().invoke(app, ["inspect", model, "--graph", str(out)])
    assert done.exit_code == 0, done.output
    said = [t[0] for t in texts(out.read_text())]
    assert "chain layers: 3 blocks" in said
    assert "m.py:model" in said
    words = ["plan", str(tmp_path / "r.graft"), "-m", model, "--graph", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = [t[0] for t in texts(out.read_text())]
    assert "removed" in said
    assert "r.graft on m.py:model" in said


MODEL = """
import torch
from torch import nn
import graftc

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    def forward(self, x):
        return x + self.ff(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def model():
    return graftc.Model(Net(), {"x": torch.zeros(2, 4, 16)})
"""
