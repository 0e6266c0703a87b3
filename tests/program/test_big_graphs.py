"""Large models are planned on meta: 7 B parameters, and a thousand blocks.

Limits on time and memory: no part of the ordinary tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.program.limits import measured

MODELS = """
import graftc
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**config):
    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(**config)).eval()
        inputs = {"input_ids": torch.zeros(1, 64, dtype=torch.long), "use_cache": False}
    return graftc.Model(module, inputs)


def seven_b():
    return llama()


def thousand_blocks():
    return llama(num_hidden_layers=1000, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=100)
"""

HYENA = """
rule hyena {
    match   a = self_attention in blocks 8..20
    replace a with hyena_x()
    drop    rotary
    expect  13
}
"""


def plan(folder: Path, function: str) -> tuple[dict[str, object], float, int]:
    (folder / "models.py").write_text(MODELS)
    (folder / "hyena.graft").write_text(HYENA)
    model = f"{folder}/models.py:{function}"
    text, seconds, peak = measured("plan", f"{folder}/hyena.graft", "-m", model, "--format", "json")
    return json.loads(text), seconds, peak


@pytest.mark.slow
def test_a_llama_of_7_b_parameters(tmp_path: Path) -> None:
    found, seconds, peak = plan(tmp_path, "seven_b")
    assert len(found["edits"]) == 13  # type: ignore[arg-type]
    assert seconds <= 30
    assert peak <= 2e9


@pytest.mark.slow
def test_a_thousand_blocks(tmp_path: Path) -> None:
    found, _, peak = plan(tmp_path, "thousand_blocks")
    assert len(found["edits"]) == 13  # type: ignore[arg-type]
    assert peak <= 2e9
