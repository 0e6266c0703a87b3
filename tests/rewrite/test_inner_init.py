"""`init` reads a site inside a matched block: `b.mlp.up`, for an operator that is inserted after or beside the block."""

from __future__ import annotations

import pytest
import torch

from graftc.compiler import compile_model
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.rewrite.plan import make_plan
from tests.rewrite.models import tiny


def test_an_inserted_mlp_starts_as_the_blocks_own() -> None:
    text = """rule grow {
        match   b = block in blocks {1}
        insert  mlp(ratio = 2, activation = gelu, gated = false) after b
        init    up = b.mlp.up, down = b.mlp.down
    }"""
    model = tiny()
    made = compile_model(check(text), model)
    (edit,) = made.plan.edits
    origins = {o.parameter.rpartition("graft0.")[2]: o.text for o in made.plan.steps[0].origins}
    assert {t for n, t in origins.items() if n.endswith("weight")} == {"b.mlp.up", "b.mlp.down"}
    new = list(made.student.module(edit.new[0].path).parameters())
    for wanted in ("up.weight", "down.weight"):
        source = model.module.get_submodule("blocks.1.mlp").get_parameter(wanted)
        assert any(torch.equal(p, source) for p in new), wanted


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(capture(tiny()))


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("b.mlp.gate", "G403", "no part `gate`"),
        ("b.cross_attention.out", "G450", "no site"),
        ("b.mlp.upp", "G109", "no part `upp`"),
    ],
)
def test_what_the_block_has_not(source: str, code: str, says: str, analysis: Analysis) -> None:
    text = f"""rule grow {{
        match   b = block in blocks {{1}}
        insert  mlp(ratio = 2, activation = gelu, gated = false) after b
        init    up = {source}, down = b.mlp.down
    }}"""
    with pytest.raises(GraftError) as caught:
        make_plan(check(text), analysis)
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert says in found.message
    assert found.span is not None
