"""What the corpus files promise of the weights, on a small Llama: which are kept, pooled, reused or fitted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import graftc.verbs as verbs
from graftc.program.model import Model
from tests.conftest import compiled
from tests.measures.test_measure import AsItIs
from tests.rewrite.test_kept_inputs import llama

CORPUS = Path(__file__).parents[1] / "corpus"
Weights = Mapping[str, Tensor]


def attention(name: str, model: Model, layer: int) -> tuple[Weights, Weights]:
    """The parameters of one layer's attention, before and after."""
    made = compiled(CORPUS / f"{name}.graft", model)
    at = f"model.layers.{layer}.self_attn."
    before, after = (
        {n.removeprefix(at): p for n, p in program.root.named_parameters() if n.startswith(at)}
        for program in (made.teacher, made.student)
    )
    return before, after


def repeated(weight: Tensor, times: int) -> Tensor:
    """Rows of key-value heads of 8, each as often as query heads read it."""
    return weight.unflatten(0, (-1, 8)).repeat_interleave(times, 0).flatten(0, 1)


def test_gqa_pools_the_key_value_heads() -> None:
    before, after = attention("gqa", llama(kv_heads=4), 1)
    pooled = [before[f"{n}_proj.weight"].unflatten(0, (4, 8)).mean(0) for n in "kv"]
    wanted = torch.cat([before["q_proj.weight"], *pooled])
    torch.testing.assert_close(after["in_proj.weight"], wanted)
    assert torch.equal(after["out_proj.weight"], before["o_proj.weight"])


def test_lolcats_keeps_q_k_v_and_out() -> None:
    before, after = attention("lolcats", llama(tokens=130), 0)
    kept = [before[f"{n}_proj.weight"] for n in "qkv"]
    assert torch.equal(after["in_proj.weight"], torch.cat(kept))
    assert torch.equal(after["out_proj.weight"], before["o_proj.weight"])


def test_mamba_reuses_the_four_weights() -> None:
    before, after = attention("mamba_in_llama", llama(), 0)
    found = after["in_proj.weight"].split([32, 32, 32, 32, 4])
    assert torch.equal(found[1], repeated(before["v_proj.weight"], 2))
    assert torch.equal(found[2], repeated(before["k_proj.weight"], 2))
    assert torch.equal(found[3], before["q_proj.weight"])
    assert torch.equal(after["out_proj.weight"], before["o_proj.weight"])


def test_svd_linear_is_nearest_where_the_inputs_are(tmp_path: Path) -> None:
    """Of rank 128, and on what its linear reads nearer than the best product of that rank for any input."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=640, num_hidden_layers=2,
        num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    assert isinstance(module, LlamaForCausalLM)
    words = [{"input_ids": torch.randint(0, 300, (24,))} for _ in range(16)]
    ids = torch.stack([w["input_ids"] for w in words])
    model = Model(module, {"input_ids": ids[:2]})
    made = verbs.compile(CORPUS / "svd_linear.graft", model, tmp_path / "b", data=words, task=AsItIs())  # fmt: skip
    assert len(made.targets["sites"]) == 6
    assert not any(s["pending"] for s in made.targets["sites"])
    read: list[Tensor] = []
    linear = module.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(linear, torch.nn.Linear)
    linear.register_forward_hook(lambda _, given, __: read.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        module(ids)
    weight, x = linear.weight.detach(), read[0]
    student = made.student().get_submodule("model.layers.0.mlp.up_proj")
    up, down = (student.get_parameter(f"{n}.weight") for n in ("up", "down"))
    product = up @ down
    assert torch.linalg.matrix_rank(product) == 128
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = u[:, :128] * s[:128] @ v[:128]
    assert (x @ (product - weight).T).norm() < 0.9 * (x @ (plain - weight).T).norm()
