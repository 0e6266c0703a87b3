"""A student back in a diffusers pipeline and in a transformers model, offline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import graftc
from graftc.diagnostics import GraftError
from graftc.emit.build import Build
from graftc.program.model import Model

HYENA = "rule h {\n match a = self_attention in blocks {1}\n replace a with hyena_x()\n drop rotary, mask\n}\n"
WIDE = "rule w {\n match m = mlp in blocks all\n replace m with mlp(ratio = 6)\n}\n"
SKIP = "rule s {\n match b = block in blocks {1}\n skip b\n}\nrule r {\n match a = self_attention in blocks {2}\n remove a\n}\n"
PAIRS = "rule p {\n match a, b = each pair of blocks all\n replace with parallel(a, b, merge = sum)\n}\n"


def dit() -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(0)
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=4, sample_size=8, out_channels=8
    ).eval()
    with torch.no_grad():  # adaLN starts at zero, and so would every difference
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def inputs(size: int = 8) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, size, size),
        "timestep": torch.tensor([100, 700]),
        "class_labels": torch.tensor([1, 7]),
    }


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(length: int = 8) -> torch.Tensor:
    return (torch.arange(2 * length) % 50).reshape(2, length)


def build(folder: Path, rules: str, module: nn.Module, given: dict[str, Any]) -> Build:
    file = folder / "rules.graft"
    file.write_text(rules)
    return graftc.compile(file, Model(copy.deepcopy(module), given), folder / "build")


@pytest.fixture
def pipeline() -> diffusers.DiTPipeline:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    pipe = diffusers.DiTPipeline(transformer=dit(), vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: diffusers.DiTPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe([1, 2], num_inference_steps=2, generator=generator, output_type="pt").images  # type: ignore[attr-defined]


@pytest.mark.parametrize("rules", [HYENA, WIDE, SKIP], ids=["hyena", "mlp", "skip_and_remove"])
def test_both_forms_give_the_same(rules: str, tmp_path: Path):
    made = build(tmp_path, rules.replace("\n drop rotary, mask", ""), dit(), inputs())
    model = dit()
    installed = graftc.install(nn.ModuleDict({"transformer": model}), made)
    assert (installed.form, installed.module) == ("modules", model)
    with torch.no_grad():
        found, wanted = model(**inputs()).sample, made.student()(**inputs())[0]
        before = dit()(**inputs()).sample
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    if rules != WIDE:  # which is exact
        assert not torch.allclose(found, before, atol=1e-3)


def test_a_pipeline_samples_saves_and_loads(pipeline, tmp_path: Path):
    teacher = draw(pipeline)
    made = build(tmp_path, HYENA.replace("\n drop rotary, mask", ""), dit(), inputs())
    said = graftc.install(pipeline, made)
    assert str(said) == "transformer: modules form"
    assert pipeline.transformer.config.sample_size == 8
    student = draw(pipeline)
    assert student.shape == teacher.shape
    assert not torch.equal(student, teacher)
    scheduler = pipeline.scheduler
    other = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    pipeline.scheduler = other
    assert draw(pipeline).shape == teacher.shape
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = graftc.from_pretrained(tmp_path / "saved", subfolder="transformer")
    for parts in ({}, {"transformer": loaded}):
        again = diffusers.DiTPipeline.from_pretrained(tmp_path / "saved", **parts)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), student)
    with pytest.raises(OSError, match=r"diffusion_pytorch_model"):
        diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "saved" / "transformer")


def test_another_resolution_dtype_and_an_adapter_beside_the_graft(tmp_path: Path):
    from peft import LoraConfig, inject_adapter_in_model

    made = build(tmp_path, HYENA.replace("\n drop rotary, mask", ""), dit(), inputs())
    model = dit().to(torch.bfloat16)
    graftc.install(nn.Sequential(model), made)
    large = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(16).items()}
    with torch.no_grad():
        assert model(**large).sample.shape == (2, 8, 16, 16)
    model = dit()
    graftc.install(nn.Sequential(model), made)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    sample = model.train()(**inputs()).sample
    sample.square().mean().backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(grads) == 2 * 3  # a and b in each of the three attentions that are left
    assert all("lora" in n for n in grads)


def test_a_saved_lora_loads_on_what_the_graft_left(tmp_path: Path):
    """As `pipe.load_lora_weights` does it: by names of modules, which the in-place form keeps."""
    from peft import LoraConfig

    from tests.models.diffusers_models import sana

    given = sana()
    tuned = copy.deepcopy(given.module)
    tuned.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q"], init_lora_weights=False))  # type: ignore[operator]
    tuned.save_lora_adapter(tmp_path / "lora")  # type: ignore[operator]
    (weights,) = (tmp_path / "lora").glob("*.safetensors")
    lora = load_file(weights)
    made = build(tmp_path, HYENA.replace(", mask", ""), given.module, dict(given.inputs))
    model = given.module
    assert graftc.install(model, made).form == "modules"
    with torch.no_grad():
        before = model(**given.inputs)[0]
        model.load_lora_adapter(lora, prefix=None)  # type: ignore[operator]
        after = model(**given.inputs)[0]
        model.disable_lora()  # type: ignore[operator]
        without = model(**given.inputs)[0]
    saved = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    loaded = {
        n.replace("default_0", "default"): p for n, p in model.named_parameters() if "lora_" in n
    }
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[n], saved[n]) for n in saved)
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(without, before)


def test_pairs_take_the_generated_form(pipeline, tmp_path: Path):
    made = build(tmp_path, PAIRS, dit(), inputs())
    said = graftc.install(pipeline, made)
    assert said.form == "generated"
    assert "restructures" in said.reason
    images = draw(pipeline)
    with torch.no_grad():
        assert pipeline.transformer(**inputs(), return_dict=False)[0].shape == (2, 8, 8, 8)
    pipeline.transformer.save_pretrained(tmp_path / "one")
    pipeline.transformer = graftc.from_pretrained(tmp_path / "one")
    assert torch.equal(draw(pipeline), images)
    with pytest.raises(ValueError, match="captured at"):
        pipeline.transformer(**inputs(16))


def test_a_decoder_generates_with_its_cache_where_the_attention_stays(tmp_path: Path):
    made = build(tmp_path, WIDE, llama(), {"input_ids": tokens(), "use_cache": False})
    model = llama()
    wanted = model.generate(tokens(5), max_new_tokens=6, do_sample=False)
    graftc.install(nn.ModuleDict({"lm": model}), made)
    assert model.config.use_cache
    assert torch.equal(model.generate(tokens(5), max_new_tokens=6, do_sample=False), wanted)


def test_a_decoder_without_a_cache_generates_what_it_computes(tmp_path: Path):
    made = build(tmp_path, HYENA, llama(), {"input_ids": tokens(), "use_cache": False})
    model = llama()
    graftc.install(model, made)
    assert not model.config.use_cache
    found = model.generate(tokens(5), max_new_tokens=6, do_sample=False)
    wanted = tokens(5)
    with torch.no_grad():
        for _ in range(6):
            last = model(wanted).logits[:, -1].argmax(-1, keepdim=True)
            wanted = torch.cat([wanted, last], dim=1)
    assert torch.equal(found, wanted)
    with pytest.raises(GraftError) as raised:
        model(tokens(5), use_cache=True)
    assert raised.value.diagnostics[0].code == "G740"
    padded = torch.ones(2, 5, dtype=torch.long)
    padded[0, 0] = 0
    with pytest.raises(GraftError) as raised:
        model(tokens(5), attention_mask=padded)
    assert raised.value.diagnostics[0].code == "G741"
    model.save_pretrained(tmp_path / "saved")
    loaded = graftc.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens(5)).logits, model(tokens(5)).logits)
    for plain in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"model\.safetensors"):  # and no random modules
            plain.from_pretrained(tmp_path / "saved")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("wide"), WIDE, dit(), inputs())


def test_an_attention_keeps_its_rotary_positions_in_place(tmp_path: Path):
    rules = "rule g {\n match a = self_attention in blocks all\n replace a with attention()\n}\n"
    made = build(tmp_path, rules, llama(), {"input_ids": tokens(), "use_cache": False})
    model = llama()
    graftc.install(model, made)
    with torch.no_grad():
        found, wanted = model(tokens(11)).logits, llama()(tokens(11)).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_install_again_takes_another_run(wide: Build):
    made = wide
    model = dit()
    graftc.install(model, made)
    with torch.no_grad():
        first = model(**inputs()).sample
        graftc.install(model, made, run="none")
        assert torch.equal(model(**inputs()).sample, first)
    assert type(model).__name__ == "GraftedDiTTransformer2DModel"


@pytest.mark.parametrize(
    ("target", "options", "code"),
    [
        (lambda: nn.Linear(2, 2), {}, "G746"),
        (lambda: nn.ModuleList([dit(), dit()]), {}, "G746"),
        (
            lambda: diffusers.DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8
            ),
            {},
            "G746",
        ),
        (dit, {"form": "other"}, "G744"),
        (dit, {"form": "generated"}, "G745"),
        (dit, {"run": "0009-distill"}, "G632"),
    ],
)
def test_a_target_that_does_not_fit_stays_as_it_is(target, options, code, wide: Build):
    given = target()
    before = {n: p.clone() for n, p in given.named_parameters()}
    with pytest.raises(GraftError) as raised:
        graftc.install(given, wide, **options)
    assert raised.value.diagnostics[0].code == code
    assert {n: p.shape for n, p in given.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }


def test_a_folder_of_another_kind_is_told(tmp_path: Path):
    dit().save_pretrained(tmp_path)
    with pytest.raises(GraftError) as raised:
        graftc.from_pretrained(tmp_path)
    assert raised.value.diagnostics[0].code == "G742"
