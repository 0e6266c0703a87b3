"""Every operator of the library inside DiT and PixArt, paired blocks, and the originals: exported and verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from graftc import verbs
from graftc.deploy.directory import Export, export_module, write_export
from graftc.deploy.ladder import verify_export
from graftc.deploy.request import read_request
from graftc.emit.package import load_package, write_package
from graftc.operators.specs import SPECS
from graftc.program.capture import capture
from graftc.program.model import Model
from tests.conftest import small_dit, small_pixart
from tests.deploy.test_operators import REQUIRED
from tests.models.zoo import CASES

MODELS = {"dit": small_dit, "pixart": small_pixart}
PAIRS = "rule p {{\n match first, second = each pair of blocks all\n replace with parallel(first, second, merge = {})\n distill l2\n}}\n"
BRANCHES = ("sum", "linear", "lerp", "gate")
GRIDS = {"dit": (4, 4), "pixart": (4, 4)}


def edits() -> list[tuple[str, str]]:
    """A name and a rule for each operator that has a role in these models, and for each merge of paired blocks."""
    found = [(f"pairs-{m}", PAIRS.format(m)) for m in BRANCHES]
    for name, spec in SPECS.items():
        role = next(
            (r for r in spec.roles if r in ("self_attention", "mlp", "norm", "linear")), None
        )
        if role is None or name in BRANCHES:
            continue
        given = ", ".join(f"{a.name} = {REQUIRED[a.name]}" for a in spec.args if a.required)
        text = f"rule r {{\n match a = {role} in blocks {{1}}\n replace a with {name}({given})\n distill l2\n}}\n"
        found.append((name, text))
    return found


def exported(model: Model, rule: str, folder: Path, precision: str = "fp32") -> Export:
    (folder / "rule.graft").write_text(rule)
    build = verbs.compile(folder / "rule.graft", model, folder / "build")
    request = read_request(build.config(), precision=precision, dynamic="batch=1:2:3")
    return write_export(build, folder / "out", request)


def original(model: Model, folder: Path, precision: str, dynamic: str) -> Export:
    about = write_package(capture(model), folder / "package")
    request = read_request(about, precision=precision, dynamic=dynamic)
    return export_module(load_package(folder / "package"), about, folder / "out", request)


def holds(export: Export) -> None:
    result = verify_export(export)
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]
    assert any(
        r.state == "PASS" and r.name.startswith("ONNX Runtime CPU, batch") for r in result.rungs
    )


@pytest.mark.parametrize("merge", ["linear"])
def test_paired_blocks_of_dit(merge, tmp_path):
    export = exported(small_dit(2), PAIRS.format(merge), tmp_path)
    holds(export)
    rules = {r["rule"] for r in export.manifest["regions"]}
    assert any(r.startswith("p @") for r in rules), rules


def test_pixart_as_it_is_in_half_precision(tmp_path):
    """Its mask has one row for all queries, and its squeeze an axis that is not 1: two of the known traps."""
    export = original(small_pixart(1), tmp_path, "fp16", "batch=1:2:3")
    holds(export)
    proto = onnx.load(str(export.model))
    assert {n.op_type for n in proto.graph.node} >= {"Attention"}
    assert "mask of one row" in export.manifest["repairs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("edit", "rule"), edits(), ids=[n for n, _ in edits()])
def test_an_edit_inside_a_model(edit, rule, name, tmp_path):
    holds(exported(replace(MODELS[name](2), grid=GRIDS[name]), rule, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [("diffusers SD3", "fp32"), ("diffusers SD3", "fp16"), ("diffusers Flux", "fp32")],
)
def test_joint_attention(name, precision, tmp_path):
    """Two streams in one attention: SD3's, whose last block only looks at the text, and Flux's with rotary positions."""
    rule = 'rule r {\n match a = joint_attention in blocks of "transformer_blocks" all\n replace a with attention()\n}\n'
    model = next(c for c in CASES if c.name == name).build()
    export = exported(model, rule, tmp_path, precision)
    holds(export)
    joint = [r for r in export.manifest["regions"] if r["rule"]]
    assert {r["operator"] for r in joint} == {"JointAttention"}
    assert len(joint) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusers AuraFlow", "transformers Gemma 3"])
def test_an_original_of_the_zoo(name, tmp_path):
    model = next(c for c in CASES if c.name == name).build()
    holds(original(model, tmp_path, "fp32", "batch=1:2:3"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_original(name, precision, tmp_path):
    result = verify_export(original(MODELS[name](2), tmp_path, precision, "batch=1:2:3"))
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]


@pytest.mark.slow
def test_the_words_of_a_caption_may_vary(tmp_path):
    """Equal dimensions of two inputs are one name in the file."""
    words = {"encoder_hidden_states": {1: "words"}, "encoder_attention_mask": {1: "words"}}
    model = small_pixart(2)
    dynamic = {name: {0: "batch"} for name in model.inputs if hasattr(model.inputs[name], "shape")}
    for name, axes in words.items():
        dynamic[name] |= axes
    export = original(
        replace(model, dynamic=dynamic), tmp_path, "fp32", "batch=1:2:3,words=4:12:20"
    )
    holds(export)
    proto = onnx.load(str(export.model))
    named = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in proto.graph.input
    }
    assert (
        named["encoder_hidden_states"][:2] == named["encoder_attention_mask"] == ["batch", "words"]
    )
