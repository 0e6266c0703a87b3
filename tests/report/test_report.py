"""The HTML report: what stands in it, that it is whole without a network, and what it says is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from drawings import HYENA, chain, pairs

from graftc.diagnostics import GraftError
from graftc.reporting.gather import gather
from graftc.reporting.page import page

RULES = 'rule hyena "a < b & c" {\n    match   a = self_attention in blocks odd\n    remove  a\n}\n'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True)
class Run:
    id: str
    path: Path
    info: dict[str, Any]


@dataclass(frozen=True)
class Build:
    path: Path
    manifest: dict[str, Any]
    plan: dict[str, Any]
    targets: dict[str, Any]
    made: tuple[Run, ...] = ()

    def runs(self) -> tuple[Run, ...]:
        return self.made


def priced(edit: dict[str, Any]) -> dict[str, Any]:
    return {
        **edit,
        "contract": "learned",
        "parameters": {"before": 16640, "after": 20096},
        "flops": {"before": 3178496, "after": 2523136},
        "weights": [{"parameter": f"{edit['site']}.in_proj.weight", "from": "concat(a.q, a.k, a.v)", "pending": True}],
        "dropped": [f"{edit['site']}.qkv.weight"],
    }  # fmt: skip


def make(folder: Path, *, bins: bool = True) -> Build:
    """A build with a finished run of each stage, and two pictures."""
    rules = folder / "r.graft"
    rules.write_text(RULES)
    for number, stage in ((1, "distill"), (2, "finetune")):
        run = folder / "runs" / f"{number:04}-{stage}"
        run.mkdir(parents=True)
        events: list[dict[str, Any]] = [{"event": "start", "steps": 3}]
        for step in (1, 2, 3):
            values = {"blocks.8.attn": 0.8 / step, "blocks.10.attn": 0.0}
            events.append(
                {"event": "step", "step": step, "generation": 0, "values": values}
                if number == 1
                else {"event": "step", "step": step, "loss": 0.1 / step, "norm": 1.0}
            )
        if bins and number == 1:
            events.append(
                {
                    "event": "bins",
                    "site": "blocks.8.attn",
                    "edges": [0, 250, 1000],
                    "errors": [0.5, 0.25],
                }
            )
        (run / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "st')
    (folder / "samples").mkdir()
    for name in ("student", "teacher"):
        (folder / "samples" / f"{name}.png").write_bytes(PNG)
    site = {
        "name": "blocks.8.attn", "operator": "hyena_x(kernel = 4)", "error_start": 0.663, "error_end": 0.0421,
        "loss_start": 0.79, "loss_end": 0.2, "steps": 3, "skipped_steps": 1,
    }  # fmt: skip
    first = {"stage": "distill", "status": "finished", "options": {"seed": 7, "lr": None},
             "versions": {"torch": "2.13.0"}, "sources": {"command": "graftc distill out -d d.py:f"},
             "result": {"sites": [site, {**site, "name": "blocks.10.attn", "error_end": 0.0}], "metrics": {}}}  # fmt: skip
    second = {"stage": "finetune", "status": "finished", "options": {}, "versions": {"torch": "2.12.1"},
              "result": {"sites": [], "metrics": {"validation loss": 0.08917985}}}  # fmt: skip
    return Build(
        folder,
        {
            "versions": {"graftc": "0.1.0", "torch": "2.13.0"},
            "command": "graftc compile r.graft -m m.py:model -o out",
            "rules": {"file": "r.graft", "read": [str(rules)], "sha256": hashlib.sha256(RULES.encode()).hexdigest(),
                      "parameters": {"kernel": "4"}},
            "model": {"reference": "m.py:model", "sha256": "ab" * 32},
            "weights": {"student": "cd" * 32, "teacher": "ef" * 32},
            "checks": ["rule `hyena`: exact to 1e-6"],
        },
        {
            "edits": [priced(e) for e in (*HYENA, *pairs(28))],
            "filtered": [{"rule": "hyena", "path": "blocks.1.attn", "reason": "tokens(a) is 16, wanted >= 64"}],
            "totals": {"parameters": {"before": 1000, "after": 900}, "flops": {"before": 5000, "after": 6000}},
            "chains": [chain(28)],
        },
        {},
        (Run("0001-distill", folder / "runs/0001-distill", first), Run("0002-finetune", folder / "runs/0002-finetune", second)),
    )  # fmt: skip


VERIFIED = {
    "file": "out/student.onnx",
    "command": "graftc verify out",
    "versions": {"onnxruntime": "1.31.1", "torch": "2.13.0"},
    "rungs": [
        {"name": "weights", "state": "PASS", "detail": "as they were"},
        {"name": "batch 3", "state": "FAIL", "detail": "max abs 1.0e-02"},
        {"name": "tensorrt", "state": "NOT RUN", "detail": "no device"},
    ],
}


class Read(HTMLParser):
    """Words by section, attributes that lead somewhere, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.links: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self._at = ""
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")
        ]
        if tag == "h2":
            self._at = given["id"] or ""
            self.sections[self._at] = ""
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self._at] += data + " "


@pytest.fixture
def whole(tmp_path: Path) -> Read:
    exports = {"out/student.onnx": {"command": "graftc export out --to onnx"}}
    return Read(page(gather(make(tmp_path), VERIFIED, exports)))


def test_it_needs_nothing_from_outside(whole: Read, tmp_path: Path) -> None:
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in whole.links)
    assert not {"script", "link", "iframe", "object"} & set(whole.tags)
    text = page(gather(Build(tmp_path, {}, {}, {})))
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\((?!#)", text)


def test_each_section_says_its_part(whole: Read) -> None:
    said = whole.sections
    assert 'rule hyena "a < b & c"' in said["edit"]
    assert "hyena_x(kernel = 4, causal = true)" in said["plan"]
    assert "16,640 → 20,096" in said["plan"]
    assert "tokens(a) is 16, wanted >= 64" in said["plan"]
    assert "blocks.8.attn.qkv.weight" in said["plan"]
    assert "chain blocks: 28 blocks" in said["drawing"]
    assert "merge = linear" in said["drawing"]
    assert "-10.00 %" in said["cost"]
    assert "+20.00 %" in said["cost"]
    assert "0.663 → 0.0421" in said["errors"]
    assert "250 to 1000" in said["errors"]
    assert "0.25" in said["errors"]
    assert "run 0001-distill" in said["curves"]
    assert "0.0891799" in said["curves"]
    assert said["samples"].split() == [
        "Samples",
        "samples",
        "teacher",
        "student",
    ]  # side by side, in this order
    assert all(w in said["verification"] for w in ("PASS", "FAIL", "NOT RUN", "no device"))
    for words in (
        "graftc compile r.graft",
        "graftc distill out -d d.py:f",
        "graftc export out --to onnx",
        "graftc verify out",
        "from Python",
    ):
        assert words in said["record"]
    assert "torch of run 0002-finetune 2.12.1" in re.sub(r"\s+", " ", said["record"])
    assert "onnxruntime of verify" in said["record"]
    assert "seed = 7" in said["record"]
    assert "exact to 1e-6" in said["record"]
    assert "ab" * 32 in said["record"]


def test_the_pictures_are_inside(whole: Read) -> None:
    pictures = [link for link in whole.links if link.startswith("data:")]
    assert len(pictures) == 2
    assert base64.b64decode(pictures[0].partition(",")[2]) == PNG


def test_errors_by_timestep_darken_with_the_error(tmp_path: Path) -> None:
    text = page(gather(make(tmp_path), VERIFIED))
    grounds = re.findall(r"rgba\(0, 114, 178, ([\d.]+)\)\">([\d.]+)<", text)
    assert [float(e) for _, e in grounds] == [0.5, 0.25]
    assert [float(g) for g, _ in grounds] == pytest.approx([0.45, 0.225], abs=0.01)


def test_samples_along_the_way_stand_after_the_ends(tmp_path: Path) -> None:
    build = make(tmp_path)
    folder = tmp_path / "runs" / "0002-finetune" / "samples"
    folder.mkdir()
    for name in ("step-000000", "step-000010", "student", "teacher"):
        (folder / f"{name}.png").write_bytes(PNG)
    said = Read(page(gather(build))).sections["samples"].split()
    assert said[4:] == [
        "runs/0002-finetune/samples",
        "teacher",
        "student",
        "step-000000",
        "step-000010",
    ]


def test_every_drawing_is_well_formed(tmp_path: Path) -> None:
    text = page(gather(make(tmp_path), VERIFIED))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4  # the edit, the errors of stage 1, a chart of curves for each run
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    said = Read(page(gather(Build(tmp_path, {}, {}, {})))).sections
    assert "gone, or it was changed since" in said["edit"]
    assert "NOT RECORDED" in said["drawing"]
    assert "NOT RECORDED" in said["errors"]
    assert "NOT RECORDED" in said["curves"]
    assert "NOT RECORDED" in said["samples"]
    assert "NOT RUN" in said["verification"]


def test_a_run_without_bins_says_why(tmp_path: Path) -> None:
    build = make(tmp_path, bins=False)
    said = Read(page(gather(build))).sections["errors"]
    assert "no input of the model is known as one" in said  # as of a language model
    build.targets["inputs"] = [{"name": "t", "meaning": "timestep"}]
    said = Read(page(gather(build))).sections["errors"]
    assert "By timestep bin: NOT RECORDED" in said
    assert "A new run records it" in said


def test_what_a_run_warned_of_stands_with_its_curves(tmp_path: Path) -> None:
    build = make(tmp_path)
    build.made[1].info["result"]["warnings"] = ["G826: DATA has a single sample"]
    said = Read(page(gather(build))).sections["curves"]
    assert "Warning, run 0002-finetune: G826: DATA has a single sample." in said


def test_bins_of_a_site_from_a_bank_are_those_of_the_bank(tmp_path: Path) -> None:
    build = make(tmp_path, bins=False)
    site = build.made[0].info["result"]["sites"][1]
    site["bins"] = {"edges": [0.0, 250.0, 1000.0], "errors": [0.875, 0.125]}
    said = Read(page(gather(build))).sections["errors"]
    assert "250 to 1000" in said
    assert "0.875" in said


def test_rules_that_were_changed_since_are_not_shown(tmp_path: Path) -> None:
    build = make(tmp_path)
    (tmp_path / "r.graft").write_text(RULES.replace("odd", "even"))
    said = Read(page(gather(build))).sections["edit"]
    assert "changed since" in said
    assert "even" not in said


def test_a_damaged_log_is_an_error_and_a_half_last_line_is_not(tmp_path: Path) -> None:
    build = make(tmp_path)
    assert gather(build).runs[0].curves["blocks.8.attn"][-1] == (3, pytest.approx(0.8 / 3))
    log = tmp_path / "runs/0001-distill/log.jsonl"
    log.write_text("{half\n" + log.read_text())
    with pytest.raises(GraftError, match="G701"):
        gather(build)
