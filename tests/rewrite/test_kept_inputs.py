"""What a site has beside its stream, and what becomes of it: masks, rotary positions, a context, a second stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.compiler import Compiled
from graftc.diagnostics import Diagnostic, GraftError
from graftc.language.check import check
from graftc.operators.joint import JointAttention
from graftc.program.model import Model
from tests.conftest import compiled, shared, small_pixart
from tests.conftest import small_dit as unshared_dit

small_dit = shared(unshared_dit)
CORPUS = Path(__file__).parents[1] / "corpus"


@shared
def llama(tokens: int = 12, kv_heads: int = 2, padded: bool = False) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=64, vocab_size=50, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 50, (2, tokens))}
    if padded:
        inputs["attention_mask"] = (torch.arange(tokens) < torch.tensor([[tokens], [7]])).long()
    return Model(LlamaForCausalLM(config).eval(), inputs)


@shared
def bert() -> Model:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )  # fmt: skip
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    inputs = {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": mask}
    return Model(BertModel(config).eval(), inputs)


@shared
def masked_pixart() -> Model:
    model = small_pixart(2)
    model.inputs["encoder_attention_mask"][1, 6:] = 0
    return model


STREAMS: dict[str, Any] = {
    "grid": (6, 6),
    "streams": {"image": "hidden_states", "text": "encoder_hidden_states"},
}


@shared
def sd3(**given: Any) -> Model:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=12, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=12,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 12),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([3.0, 500.0]),
    }
    return Model(module.eval(), inputs, **given)


@shared
def flux(**given: Any) -> Model:
    """Rotary positions over both streams, RMS norms of q and k, and text first."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    for name, parameter in module.named_parameters():
        if "norm_" in name and parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 2)  # so that a norm's weight taken wrongly shows
    ids = torch.zeros(36, 3)
    ids[:, 1], ids[:, 2] = torch.arange(36) // 6, torch.arange(36) % 6
    inputs = {
        "hidden_states": torch.randn(2, 36, 4),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([3.0, 500.0]),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
    }
    return Model(module.eval(), inputs, **given)


@shared
def dit_with_grid() -> Model:
    model = small_dit(2)
    return Model(model.module, model.inputs, meanings=model.meanings, grid=(4, 4))


def rule(role: str, edit: str, more: str = "") -> str:
    return f"rule r {{\n match a = {role}\n replace a with {edit}\n {more}\n distill l2\n}}"


def difference(made: Compiled, model: Model) -> float:
    """The largest difference between student and teacher, relative to the teacher's largest value."""
    given = [model.inputs[p.name] for p in made.teacher.inputs]
    with torch.no_grad():
        wanted, found = made.teacher.root(*given)[0], made.student.root(*given)[0]
    return float((found - wanted).abs().max() / wanted.abs().max())


def refused(text: str, model: Model) -> Diagnostic:
    with pytest.raises(GraftError) as caught:
        compiled(text, model)
    return caught.value.diagnostics[0]


SELF = "self_attention in blocks all"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("edit", ["attention()", "sliding_window(window = 11)"])
def test_llama_keeps_rotary_positions_groups_and_its_mask(edit: str, padded: bool) -> None:
    """A self-graft, and a window that all but covers the tokens, whose last token alone differs."""
    model = llama(padded=padded)
    made = compiled(rule(SELF, edit), model)
    new = made.plan.edits[0].new[0]
    assert new.arguments["rotary"] == "half"
    assert set(new.inputs) == {"cos", "sin", *(["mask"] if padded else [])}
    assert new.arguments["kv_heads"] == 2
    assert difference(made, model) < 1e-5


def test_bert_keeps_its_mask() -> None:
    made = compiled(rule(SELF, "attention()"), bert())
    assert set(made.plan.edits[0].new[0].inputs) == {"mask"}
    assert difference(made, bert()) < 1e-5


def test_a_mask_that_differs_by_query_is_refused_by_linear_attention() -> None:
    found = refused(rule(SELF, "linear_attention()"), bert())
    assert found.code == "G360"
    assert "differs from query to query" in found.message
    assert "encoder.layer.0.attention.self_attention" in found.message


def test_cross_attention_keeps_its_context_and_mask() -> None:
    model = masked_pixart()
    made = compiled(rule("cross_attention in blocks all", "attention()"), model)
    assert set(made.plan.edits[0].new[0].inputs) == {"context", "mask"}
    assert difference(made, model) == 0
    fewer = compiled(rule("cross_attention in blocks all", "attention(kv_heads = 1)",
                          "init q = a.q, k = mean_pool(a.k, groups = 1), v = mean_pool(a.v, groups = 1)"),
                     model)  # fmt: skip
    assert 0 < difference(fewer, model) < 1


def test_a_dropped_mask_is_dropped() -> None:
    model = masked_pixart()
    made = compiled(rule("cross_attention in blocks all", "attention()", "drop mask"), model)
    assert set(made.plan.edits[0].new[0].inputs) == {"context"}
    assert difference(made, model) > 0


def test_what_a_site_would_lose_is_said() -> None:
    assert refused(rule(SELF, "hyena_x()"), llama()).code == "G354"
    assert refused(rule(SELF, "attention(rotary = none)"), llama()).code == "G354"
    wrong = refused(rule(SELF, "attention(rotary = interleaved)"), llama())
    assert (wrong.code, wrong.wanted) == ("G481", "rotary = half")
    assert refused(rule(SELF, "attention(rotary = half)"), small_dit(2)).code == "G481"
    assert difference(compiled(rule(SELF, "hyena_x()", "drop rotary"), llama()), llama()) > 0


def test_the_targets_of_a_kept_input_run_on_the_teachers_values() -> None:
    """Stage 1 sees the mask and the tables: the student's region gives what the teacher's did."""
    from graftc.distillation import capture_graph, extract

    model = llama(padded=True)
    made = compiled(rule(SELF, "attention()"), model)
    rules = rule(SELF, "linear_window_attention(window = 6)")
    masked = refused(rules, model)
    assert masked.code == "G360"  # padding and causality in one mask: not one of keys
    made = compiled(rules, llama())
    (site, *_) = made.targets.sites
    (values, *_) = capture_graph(made.teacher.root, [s.teacher for s in made.targets.sites])(
        **{p.name: llama().inputs[p.name] for p in made.teacher.inputs}
    )
    names = [i.name for i in site.teacher.inputs]
    order = [names.index(i.name) for i in site.student.inputs]
    found = extract(made.student.root, site.student)(*(values[i] for i in order))
    torch.testing.assert_close(found, values[-1])  # two blocks of 6 are softmax alone


@pytest.mark.parametrize("make", [sd3, pytest.param(flux, marks=pytest.mark.slow)])
def test_a_disc_over_everything_is_the_joint_attention(make: Any) -> None:
    model = make(**STREAMS)
    text = (CORPUS / "local_2d.graft").read_text()  # radius = 16, on a grid of 6 x 6
    made = compiled(text, model)
    assert difference(made, model) < 1e-5
    assert difference(compiled(text.replace("16", "2"), model), model) > 1e-4


def test_both_streams_of_a_joint_site_are_distilled() -> None:
    from graftc.distillation import capture_graph, extract

    model = sd3(**STREAMS)
    made = compiled((CORPUS / "local_2d.graft").read_text(), model)
    first = made.targets.sites[0]
    inputs = {p.name: model.inputs[p.name] for p in made.teacher.inputs}
    ((*given, wanted),) = capture_graph(made.teacher.root, [first.teacher])(**inputs)
    assert wanted.shape == (2, (36 + 7) * 16)
    torch.testing.assert_close(extract(made.student.root, first.student)(*given), wanted)


POOLED = "init\n" + "\n".join(
    f"  {n} = mean_pool(a.{n}, groups = 1)" for n in ("k_1", "k_2", "v_1", "v_2")
)


def grouped() -> Model:
    """A joint attention of four query heads and two of keys and values."""

    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = JointAttention(16, 16, heads=4, kv_heads=2)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            image, text = self.attn(x.tanh(), context.tanh())
            return torch.cat((x + image, context + text), 1)

    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 9, 16), "context": torch.randn(2, 5, 16)}
    return Model(Grouped().eval(), inputs)


@pytest.mark.parametrize(
    ("kv_heads", "given", "init"),
    [(2, "", ""), (4, "kv_heads = 4", ""), (1, "kv_heads = 1", POOLED)],
)
def test_grouped_heads_of_a_joint_attention(kv_heads: int, given: str, init: str) -> None:
    """As many as the site's lose nothing, and so do more, each repeated; fewer are the means of groups."""
    model = grouped()
    made = compiled(rule("joint_attention", f"attention({given})", init), model)
    assert made.plan.edits[0].new[0].arguments["kv_heads"] == kv_heads
    off = difference(made, model)
    assert off > 1e-3 if kv_heads == 1 else off < 1e-5
    new = dict(made.student.root.named_parameters())["attn.in_proj.weight"]
    old = dict(made.teacher.root.named_parameters())["attn.in_proj.weight"]
    if kv_heads == 1:
        torch.testing.assert_close(new[16:20], (old[16:20] + old[20:24]) / 2)


def test_the_grid_and_the_streams_must_be_known() -> None:
    text = (CORPUS / "local_2d.graft").read_text()
    missing = refused(text, sd3())
    assert missing.code == "G482"
    assert "grid = (rows, columns)" in str(missing.wanted)
    assert refused(text, sd3(grid=(6, 6))).code == "G482"
    assert refused(text, sd3(**{**STREAMS, "grid": (5, 5)})).code in ("G360", "G482")
    named = text.replace("text: full", "words: full")
    assert refused(named, sd3(**STREAMS)).code == "G358"
    with pytest.raises(GraftError, match="no tensor input"):
        sd3(grid=(6, 6), streams={"image": "latents"})


CORPUS_FILES = [
    ("lolcats", lambda: llama(tokens=130), 2),
    ("mamba_in_llama", llama, 1),
    ("gqa", lambda: llama(kv_heads=4), 2),
]


@pytest.mark.parametrize(("name", "make", "edits"), CORPUS_FILES)
def test_corpus_on_a_llama(name: str, make: Any, edits: int) -> None:
    model = make()
    made = compiled((CORPUS / f"{name}.graft").read_text(), model)
    assert len(made.plan.edits) == len(made.targets.sites) == edits
    assert 0 < difference(made, model) < 10
    for o in made.plan.steps[0].origins:
        assert o.parameter in dict(made.student.root.named_parameters())


def test_lolcats_trains_its_feature_maps_alone() -> None:
    made = compiled((CORPUS / "lolcats.graft").read_text(), llama(tokens=130))
    site = made.targets.sites[0]
    assert {t.rpartition(".")[2] for t in site.trainable} == {"feature_q", "feature_k", "factor"}


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (rule(SELF, "sliding_window(window = 16)"), "G355", "covers all 16 tokens"),
        (rule(SELF, "attention(heads = 3)"), "G352", "a divisor of the width 32"),
        (rule(SELF, "attention(kv_heads = 3)"), "G358", "heads 2 is not a multiple of kv_heads 3"),
        (rule(SELF, "hyena_x(causal = false, dims = 2)"), "G482", "needs the token grid"),
        (rule(SELF, "local_attention_2d(radius = 2)"), "G482", "needs the token grid"),
        (rule(SELF, "hyena_x(height = 4)"), "G485", "is for `dims=2`"),
        (
            rule("mlp in blocks all", "mlp_hyena_x(tokens = 7)"),
            "G366",
            "built for 7 tokens, and transformer_blocks.0.ff has 16",
        ),
    ],
)
def test_what_does_not_fit_a_site(text: str, code: str, says: str) -> None:
    found = refused(text, small_dit(2))
    assert found.code == code
    assert says in f"{found.message} {found.wanted}"
    assert "transformer_blocks.0." in f"{found.site} {found.message}"


def test_a_causal_site_is_not_given_eyes_for_the_future() -> None:
    for edit in (
        "attention(causal = false)",
        "mamba2(causal = false)",
        "local_attention_2d(radius = 2)",
    ):
        found = refused(rule(SELF, edit, "drop rotary"), llama())
        assert found.code in ("G353", "G482")
    with pytest.raises(GraftError) as caught:
        check(rule(SELF, "hyena_x(kernel = 0)"))
    assert caught.value.diagnostics[0].code == "G122"


@pytest.mark.parametrize(
    "edit",
    [
        "hyena_x(kernel = 3, causal = false, dims = 2)",
        pytest.param("hyena_y(kernel = 3, causal = false, dims = 2)", marks=pytest.mark.slow),
        pytest.param("depthwise_conv(kernel = 3, dims = 2)", marks=pytest.mark.slow),
        "local_attention_2d(radius = 2)",
        "mamba2(state = 4, head_dim = 8, causal = false)",
        "latent_attention(rank = 8)",
        pytest.param("linear_attention(feature = softmax_pair)", marks=pytest.mark.slow),
        "linear_window_attention(window = 4)",
        pytest.param("attention(qk_norm = rms_norm)", marks=pytest.mark.slow),
    ],
)
def test_compiles_on_a_dit_with_a_grid(edit: str) -> None:
    model = dit_with_grid()
    assert difference(compiled(rule(SELF, edit), model), model) < 10


def test_an_mlp_along_the_channels_compiles() -> None:
    model = small_dit(2)
    assert difference(compiled(rule("mlp in blocks all", "mlp_hyena_x()"), model), model) < 10


BUILDS = {
    "lolcats": lambda: ((CORPUS / "lolcats.graft").read_text(), llama(tokens=130)),
    "cross-attention": lambda: (
        rule("cross_attention in blocks all", "attention()"),
        masked_pixart(),
    ),
    "padded window": lambda: (rule(SELF, "sliding_window(window = 4)"), llama(padded=True)),
    "disc": lambda: (
        (CORPUS / "local_2d.graft").read_text().replace("16", "2"),
        sd3(**STREAMS),
    ),
    "mamba2": lambda: ((CORPUS / "mamba_in_llama.graft").read_text(), llama()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_the_package_and_onnx_agree_with_the_student(name: str, tmp_path: Path) -> None:
    """What an operator keeps is printed into the standalone package, and exported."""
    import graftc
    from graftc.emit.onnx import export_onnx

    onnxruntime = pytest.importorskip("onnxruntime")
    text, model = BUILDS[name]()
    (tmp_path / "r.graft").write_text(text)
    build = graftc.compile(tmp_path / "r.graft", model, tmp_path / "out")
    source = (tmp_path / "out" / "student" / "model.py").read_text()
    assert "import graftc" not in source
    assert "from graftc" not in source
    given = {i["name"]: model.inputs[i["name"]] for i in build.config()["inputs"]}
    student = compiled(text, model).student
    with torch.no_grad():
        wanted = student.root(*given.values())[0]
        found = build.student(None)(**given)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, wanted)
    session = onnxruntime.InferenceSession(str(export_onnx(build, run="none")))
    names = {i.name for i in session.get_inputs()}
    (first, *_) = session.run(None, {k: v.numpy() for k, v in given.items() if k in names})
    torch.testing.assert_close(torch.from_numpy(first), wanted, rtol=1e-4, atol=1e-5)
