"""Attention and MLP that a block writes into its own forward get a module each, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from graftc.program.analysis import analyse
from graftc.program.capture import capture
from graftc.program.outline import original_name
from graftc.program.parts import PartRef, part_refs
from tests.models import plain_models, transformers_models
from tests.models.case import Case


@pytest.mark.parametrize(
    "case",
    [
        Case("einsum", plain_models.einsum),
        Case("encoder", plain_models.encoder),
        Case("bert", transformers_models.bert),
    ],
    ids=lambda c: c.name,
)
def test_the_program_computes_what_the_model_computes(case: Case) -> None:
    model = case.build()
    program = capture(model)
    with torch.no_grad():
        wanted = model.module(**model.inputs)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
        found = program.root(*[model.inputs[p.name] for p in program.inputs])[0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert {original_name(program, n) for n, _ in program.root.named_parameters()} <= {
        n for n, _ in model.module.named_parameters()
    }


def test_einsum_in_a_blocks_forward() -> None:
    model = Case("einsum", plain_models.einsum).build()
    analysis = analyse(capture(model))
    assert [s.path for s in analysis.of_role("self_attention")] == [
        f"blocks.{i}.self_attention" for i in range(3)
    ]
    assert [s.path for s in analysis.of_role("mlp")] == [f"blocks.{i}.mlp" for i in range(3)]
    refs = part_refs(analysis, "blocks.1.self_attention")
    assert {k: r.weight for k, r in refs.items() if isinstance(r, PartRef)} == {
        k: f"blocks.1.self_attention.to_{k}.weight" for k in ("q", "k", "v", "out")
    }
    assert (
        original_name(analysis.program, "blocks.1.self_attention.to_q.weight")
        == "blocks.1.to_q.weight"
    )
    assert {"norm1", "norm2"} <= {s.path.rpartition(".")[2] for s in analysis.of_role("norm")}


def test_an_mlp_across_two_modules() -> None:
    """BERT's: the up map in `intermediate`, the down map in `output`, with the residual and the norm."""
    analysis = analyse(capture(Case("bert", transformers_models.bert).build()))
    mlps = [s.path for s in analysis.of_role("mlp")]
    assert mlps == [f"encoder.layer.{i}.mlp" for i in range(3)]
    assert [len(c) for c in analysis.chains] == [3]
    norms = [s.path for s in analysis.of_role("norm")]
    assert "encoder.layer.0.output.LayerNorm" in norms
