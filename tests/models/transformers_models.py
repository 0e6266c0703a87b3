"""Small random models of transformers, and plain attention as each model writes it."""

from __future__ import annotations

from typing import Any

import torch

from graftc.program.model import Model
from tests.models.case import Case, unlike

TOKENS = {"input_ids": {0: "batch", 1: "tokens"}}


def _ids(tokens: int = 7, vocabulary: int = 40) -> torch.Tensor:
    return torch.randint(3, vocabulary, (2, tokens))


def _text(module: Any, mask: bool = False, dynamic_length: bool = True, **more: Any) -> Model:
    inputs: dict[str, Any] = {"input_ids": _ids(), **more}
    dynamic = {"input_ids": {0: "batch", 1: "tokens"} if dynamic_length else {0: "batch"}}
    if mask:
        inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
        dynamic["attention_mask"] = dynamic["input_ids"]
    return Model(unlike(module), inputs, dynamic=dynamic)


DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama() -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**DECODER, num_key_value_heads=2, use_cache=False)
    return _text(LlamaForCausalLM(config))


def qwen3() -> Model:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=8, use_cache=False)
    return _text(Qwen3ForCausalLM(config))


def mistral() -> Model:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**DECODER, num_key_value_heads=2, use_cache=False, sliding_window=4)
    return _text(MistralForCausalLM(config))


def gemma3() -> Model:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **DECODER, num_key_value_heads=2, head_dim=8, use_cache=False, sliding_window=4
    )
    return _text(Gemma3ForCausalLM(config))


def gpt2() -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_positions=64, n_embd=32, n_layer=3, n_head=4, use_cache=False
    )
    return _text(GPT2LMHeadModel(config))


def gpt_neox() -> Model:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return _text(GPTNeoXForCausalLM(GPTNeoXConfig(**DECODER, use_cache=False)))


def opt() -> Model:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=40,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        use_cache=False,
    )
    return _text(OPTForCausalLM(config))


def phi3() -> Model:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        **DECODER, num_key_value_heads=2, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    return _text(Phi3ForCausalLM(config))


def bert() -> Model:
    from transformers import BertConfig, BertModel

    return _text(BertModel(BertConfig(**DECODER)), mask=True)


def roberta() -> Model:
    from transformers import RobertaConfig, RobertaModel

    return _text(RobertaModel(RobertaConfig(**DECODER)), mask=True)


def distilbert() -> Model:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=40, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64
    )
    return _text(DistilBertModel(config), mask=True)


def t5_encoder() -> Model:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return _text(T5EncoderModel(config), mask=True)


VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def vit() -> Model:
    from transformers import ViTConfig, ViTModel

    module = ViTModel(ViTConfig(**VISION, intermediate_size=48))
    return Model(unlike(module), {"pixel_values": torch.randn(2, 3, 16, 16)})


def dinov2() -> Model:
    from transformers import Dinov2Config, Dinov2Model

    module = Dinov2Model(Dinov2Config(**VISION, mlp_ratio=2))
    return Model(unlike(module), {"pixel_values": torch.randn(2, 3, 16, 16)})


def clip_text() -> Model:
    from transformers import CLIPTextConfig, CLIPTextModel

    return _text(CLIPTextModel(CLIPTextConfig(**DECODER, projection_dim=16)), dynamic_length=False)


def clip_vision() -> Model:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    module = CLIPVisionModel(CLIPVisionConfig(**VISION, intermediate_size=48, projection_dim=16))
    return Model(unlike(module), {"pixel_values": torch.randn(2, 3, 16, 16)})


def whisper_encoder() -> Model:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
    )
    return Model(unlike(WhisperEncoder(config)), {"input_features": torch.randn(2, 8, 20)})


CAUSAL = {"causal"}
CASES = (
    Case("transformers Llama", llama, (3,), 3, mlp=3, gated=3, has={"causal", "rotary", "groups"}),
    Case("transformers Qwen3", qwen3, (3,), 3, mlp=3, gated=3, has={"causal", "rotary", "groups", "qk_norm"}),
    Case("transformers Mistral", mistral, (3,), 3, mlp=3, gated=3, has={"rotary", "groups"}),
    Case("transformers Gemma 3", gemma3, (3,), 3, mlp=3, gated=3, has={"rotary", "groups", "qk_norm"}),
    Case("transformers GPT-2", gpt2, (3,), 3, mlp=3, has={"causal"}),
    Case("transformers GPT-NeoX", gpt_neox, (3,), 3, mlp=3, has={"causal", "rotary"}),
    Case("transformers OPT", opt, (3,), 3, mlp=3, has={"causal"}),
    Case("transformers Phi-3", phi3, (3,), 3, mlp=3, gated=3, has={"causal", "rotary", "groups"}),
    Case("transformers BERT", bert, (3,), 3, mlp=3, has={"mask"}),
    Case("transformers RoBERTa", roberta, (3,), 3, mlp=3, has={"mask"}),
    Case("transformers DistilBERT", distilbert, (3,), 3, mlp=3, has={"mask"}),
    Case("transformers T5 encoder", t5_encoder, (3,), 3, mlp=3, gated=3, has={"mask"}),
    Case("transformers ViT", vit, (3,), 3, mlp=3),
    Case("transformers DINOv2", dinov2, (3,), 3, mlp=3),
    Case("transformers CLIP text", clip_text, (3,), 3, mlp=3, has={"causal"}),
    Case("transformers CLIP vision", clip_vision, (3,), 3, mlp=3),
    Case("transformers Whisper encoder", whisper_encoder, (3,), 3, mlp=3),
)  # fmt: skip
