"""`diffusers:CLASS@…` and `transformers:CLASS@…`, from folders that the test saves: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml

from graftc import verbs
from graftc.diagnostics import GraftError
from graftc.program.libraries import LibraryReference
from graftc.program.model import load_model

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SMALL: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {**HEADS, "num_layers": 2, "sample_size": 8},
    "PixArtTransformer2DModel": {
        **HEADS, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 12,
    },
    "SD3Transformer2DModel": {
        **HEADS, "num_layers": 2, "sample_size": 8, "joint_attention_dim": 12,
        "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1,
        "num_single_layers": 1, "joint_attention_dim": 12, "pooled_projection_dim": 10,
        "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
    },
    "SanaTransformer2DModel": {
        **HEADS, "num_layers": 2, "in_channels": 4, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8,
    },
    "HunyuanDiT2DModel": {
        **HEADS, "num_layers": 2, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16,
        "cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 6,
        "text_len": 5, "text_len_t5": 6,
    },
    "AuraFlowTransformer2DModel": {
        **HEADS, "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 16,
    },
    "Lumina2Transformer2DModel": {
        "num_attention_heads": 2, "num_kv_heads": 1, "sample_size": 8, "in_channels": 4, "hidden_size": 32,
        "num_layers": 2, "num_refiner_layers": 1, "cap_feat_dim": 12, "axes_dim_rope": (4, 4, 8),
        "axes_lens": (32, 32, 32),
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 12, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
        "max_text_seq_length": 6,
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
    },
}  # fmt: skip
BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def llama(folder: Path) -> str:
    config = transformers.LlamaConfig(
        vocab_size=50, bos_token_id=1, eos_token_id=2, num_key_value_heads=1, **BODY
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return f"transformers:LlamaForCausalLM@{folder}"


@pytest.mark.parametrize("name", SMALL)
def test_a_diffusers_model_runs_on_the_inputs_derived_from_its_config(name: str, tmp_path: Path):
    saved = getattr(diffusers, name)(**SMALL[name]).eval()
    saved.save_pretrained(tmp_path / "transformer")
    word = f"diffusers:{name}@{tmp_path}#transformer"
    model = load_model(word)
    with torch.no_grad():
        found, wanted = model.module(**model.inputs)[0], saved(**model.inputs)[0]
    assert torch.equal(found, wanted)
    planned = load_model(word, on_meta=True)
    assert all(p.is_meta for p in planned.module.parameters())
    assert {n: p.shape for n, p in planned.module.named_parameters()} == {
        n: p.shape for n, p in saved.named_parameters()
    }


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("BertModel", transformers.BertConfig(vocab_size=50, **BODY)),
        ("ViTModel", transformers.ViTConfig(image_size=32, patch_size=8, **BODY)),
        ("CLIPVisionModel", transformers.CLIPVisionConfig(image_size=32, patch_size=8, **BODY)),
        (
            "T5EncoderModel",
            transformers.T5Config(
                vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
            ),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_transformers_model_runs_on_the_inputs_derived_from_its_config(cls, config, tmp_path):
    saved = getattr(transformers, cls)(config).eval()
    saved.save_pretrained(tmp_path)
    model = load_model(f"transformers:{cls}@{tmp_path}")
    with torch.no_grad():
        assert torch.equal(model.module(**model.inputs)[0], saved(**model.inputs)[0])


def test_a_llama_compiles_from_its_folder_and_is_found_again(tmp_path, monkeypatch):
    word = llama(tmp_path / "llama")
    file = tmp_path / "wide.graft"
    file.write_text(
        "rule wide {\n match m = mlp in blocks all\n replace m with mlp(ratio = 3)\n}\n"
    )
    assert len(verbs.inspect(word).chains[0]) == 2
    monkeypatch.chdir(tmp_path)  # a relative folder, named from elsewhere later
    build = verbs.compile(file, "transformers:LlamaForCausalLM@llama", tmp_path / "build")
    monkeypatch.chdir("/")
    said = yaml.safe_load((tmp_path / "build/manifest.yaml").read_text())["model"]
    assert said["absolute"] == word
    assert len(said["sha256"]) == 64
    ids = torch.arange(128).reshape(2, 64) % 50
    with torch.no_grad():
        wanted = load_model(word).module(input_ids=ids, use_cache=False)[0]
        found = build.teacher()(input_ids=ids)
    assert torch.allclose(found["logits"] if isinstance(found, dict) else found[0], wanted)


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("diffusers:DiTTransformer2DModell@{}", "G221", "`diffusers:DiTTransformer2DModel@"),
        ("diffusers:PixArtTransformer2DModel@{}#transformer", "G221", "is not of PixArt"),
        ("diffusers:DiTTransformer2DModel@{}", "G221", "#transformer"),
        ("diffusers:DiTTransformer2DModel@./nowhere", "G221", "there is no folder"),
        ("diffusers:DiT@", "G221", "not of the form"),
        ("diffusers:DiTTransformer2DModel@no/such-id", "G203", "no/such-id"),
        ("diffusers:DiTTransformer2DModel@{}#weightless", "G203", "diffusion_pytorch_model"),
        ("transformers:Wav2Vec2ForCTC@{}/w2v", "G220", "`input_values`"),
    ],
)
def test_a_wrong_reference_says_what_to_do(word, code, said, tmp_path):
    model = diffusers.DiTTransformer2DModel(**SMALL["DiTTransformer2DModel"])
    model.save_pretrained(tmp_path / "transformer")
    model.save_config(tmp_path / "weightless")
    config = transformers.Wav2Vec2Config(
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=9, **BODY
    )
    if "w2v" in word:
        transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "w2v")
    with pytest.raises(GraftError) as raised:
        load_model(word.format(tmp_path))
    assert raised.value.diagnostics[0].code == code
    assert said in str(raised.value)


def test_a_reference_reads_as_it_is_written():
    found = LibraryReference.parse("transformers:LlamaModel@org/name")
    assert (found.library, found.name, found.where, found.subfolder) == (
        "transformers", "LlamaModel", "org/name", None,
    )  # fmt: skip
    assert found.absolute() == "transformers:LlamaModel@org/name"


def test_an_input_can_be_fixed_in_the_reference(tmp_path):
    diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16), cap_feat_dim=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    word = f"diffusers:Lumina2Transformer2DModel@{tmp_path}"
    with pytest.raises(GraftError, match=r"G210(.|\n)*\?fixed=mask"):
        verbs.inspect(word)
    found = verbs.inspect(f"{word}?fixed=encoder_attention_mask")
    assert "encoder_attention_mask" not in {p.name for p in found.program.inputs}
    assert {s.kept["rotary"].form for s in found.of_role("self_attention")} == {"pairs"}
    with pytest.raises(GraftError, match="G808"):
        verbs.inspect(f"{word}?fixed=mask")
