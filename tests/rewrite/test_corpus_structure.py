"""The corpus files that restructure a model compile on a small Llama, and keep their contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftc.distillation.targets import Only
from graftc.program.model import Model
from graftc.rewrite.apply import undo
from tests.conftest import compiled

CORPUS = Path(__file__).parents[1] / "corpus"


@pytest.fixture(scope="module")
def llama() -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    module = LlamaForCausalLM(config).eval()
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return Model(module, {"input_ids": torch.randint(0, 64, (2, 12))})


@pytest.mark.parametrize(
    ("name", "edits", "contract"),
    [
        ("llama_pro", 3, "exact"),
        ("expand_interpolate", 3, "exact"),
        ("parallel_block", 8, "learned"),
    ],
)
def test_compiles_on_llama(llama: Model, name: str, edits: int, contract: str) -> None:
    made = compiled(CORPUS / f"{name}.graft", llama)
    assert [e.rule.contract for e in made.plan.edits] == [contract] * edits
    assert len(made.checks) == (contract == "exact")
    if contract == "exact":
        inserted = tuple(n.path for e in made.plan.edits for n in e.new)
        assert made.targets.stage2.train == Only(inserted)
        assert inserted[0].startswith("model.layers.3_graft0")
    else:
        assert [s.student.output for s in made.targets.sites] == [
            f"model.layers.{i}" for i in range(4, 12)
        ]
    back = undo(made.student, made.patch).root.state_dict()
    original = made.teacher.root.state_dict()
    assert list(back) == list(original)
    assert all(torch.equal(back[n], original[n]) for n in original)


def test_conv_beside_attention_is_exact(dit_model: Model) -> None:
    made = compiled(CORPUS / "conv_beside_attention.graft", dit_model)
    assert len(made.plan.edits) == 4
    assert len(made.checks) == 1
