"""Several forms of one function: they agree, the plan says which was chosen, and a rule can force one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graftc.verbs as verbs
from graftc.diagnostics import GraftError
from graftc.emit.package import load_package
from graftc.loading import machine_of
from graftc.operators.build import arguments_at, build
from graftc.operators.forms import choose
from graftc.operators.spec import CPU, Machine
from graftc.operators.specs import SPECS
from graftc.program.model import Model

DIM = 16
SITE = {"dim": DIM, "heads": 4, "kv_heads": 4, "head_dim": 4, "causal": False, "rotary": "none"}
FORMS = {
    "sliding_window": ("blocks", "dense"),
    "hyena_x": ("conv", "shifts"),
    "hyena_y": ("conv", "shifts"),
    "hyena_se": ("conv", "shifts"),
}
CASES = [
    ("sliding_window", {"window": 3}),
    ("sliding_window", {"window": 20, "causal": True}),
    ("sliding_window", {"window": 5, "kv_heads": 2}),
    *[(name, {"kernel": 4, "causal": True}) for name in ("hyena_x", "hyena_y", "hyena_se")],
    *[(name, {"kernel": 7, "causal": False}) for name in ("hyena_x", "hyena_y", "hyena_se")],
    ("hyena_y", {"kernel": 1, "order": 3}),
]


def _made(name: str, form: str, given: dict[str, object]) -> torch.nn.Module:
    spec = SPECS[name]
    arguments = {
        a.name: given.get(
            a.name,
            SITE.get(a.name, a.default.otherwise) if hasattr(a.default, "fact") else a.default,
        )
        for a in spec.args
        if a.when is None
    }
    torch.manual_seed(0)
    return build(spec, {**arguments, "form": form})


@pytest.mark.parametrize(("name", "given"), CASES)
@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
def test_forms_are_one_function(name, given, tokens):
    """Outputs within 1e-5 and gradients of every weight within 1e-4, relative to their size."""
    one, other = (_made(name, form, given) for form in FORMS[name])
    assert one.state_dict().keys() == other.state_dict().keys()
    x = torch.randn(3, tokens, DIM)
    a, b = one(x), other(x)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    a.square().mean().backward()
    b.square().mean().backward()
    wanted = [p.grad for p in one.parameters()]
    for want, parameter in zip(wanted, other.parameters(), strict=True):
        assert want is not None
        assert parameter.grad is not None
        assert (parameter.grad - want).abs().max() <= 1e-4 * (want.abs().max() + 1e-3)


def test_a_mask_hides_the_same_in_both():
    blocks, dense = (_made("sliding_window", f, {"window": 3}) for f in ("blocks", "dense"))
    x, mask = torch.randn(2, 20, DIM), torch.rand(2, 1, 1, 20) > 0.3
    mask[..., 0] = True
    a, b = blocks(x, mask), dense(x, mask)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _model(tokens: int) -> Model:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(DIM, 4, 32, batch_first=True, norm_first=True).eval()
    return Model(torch.nn.ModuleList([layer])[0], {"src": torch.randn(2, tokens, DIM)})


RULE = """
rule local {
    match   a = self_attention
    replace a with sliding_window(window = 2%s)
    distill l2
}
"""


GPU, ONNX = Machine("cuda", "bf16"), Machine("cuda", "fp16", "tensorrt")
CHOSEN = [
    ("sliding_window", {"window": 4, "head_dim": 16}, 4096, {CPU: "blocks", GPU: "flex", ONNX: "blocks"}),
    ("sliding_window", {"window": 4, "head_dim": 8}, 4096, {CPU: "blocks", GPU: "blocks"}),
    ("sliding_window", {"window": 4, "head_dim": 16}, 64, {CPU: "dense", GPU: "dense", ONNX: "dense"}),
    ("sliding_window", {"window": 4, "head_dim": 16}, None, {CPU: "blocks", GPU: "flex", ONNX: "blocks"}),
    ("local_attention_2d", {"radius": 2, "head_dim": 16}, 4096, {CPU: "tiles", GPU: "flex", ONNX: "tiles"}),
    ("hyena_x", {}, 4096, {CPU: "conv", GPU: "shifts", ONNX: "conv"}),
    ("hyena_y", {"dims": 2, "causal": False}, 4096, {CPU: "conv", GPU: "conv", ONNX: "conv"}),
    ("linear_attention", {}, 4096, {CPU: "products", GPU: "products", ONNX: "products"}),
    ("mamba2", {}, 4096, {CPU: "chunks", ONNX: "chunks"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "tokens", "wanted"), CHOSEN)
def test_the_form_is_chosen_by_where_it_runs_and_how_long_it_is(name, given, tokens, wanted):
    site = {**SITE, "tokens": tokens, "grid_height": 64, "grid_width": 64}
    for machine, form in wanted.items():
        assert arguments_at(SPECS[name], site, given, machine)["form"] == form, machine


def test_a_form_that_is_passed_over_is_said_with_its_reason():
    given = arguments_at(SPECS["sliding_window"], {**SITE, "tokens": 4096}, {"window": 4})
    choice = choose(SPECS["sliding_window"], {**given, "form": "auto"}, GPU, 4096)
    assert "not flex: FlexAttention wants a head_dim of at least 16, found 4" in choice.why


@pytest.mark.parametrize("window", [1, 8, 64, 500])
@pytest.mark.parametrize("causal", [False, True])
def test_all_pairs_are_never_made_where_blocks_make_fewer(window, causal):
    """The dense mask is for lengths at which a block of queries sees nearly all tokens anyway."""
    for tokens in (64, 256, 1024, 4096, 16384):
        site = {**SITE, "tokens": tokens}
        made = arguments_at(SPECS["sliding_window"], site, {"window": window, "causal": causal})
        cut = (max(window, 16) + (1 if causal else 2) * window) * tokens
        assert made["form"] == "blocks" or tokens * tokens < cut + 112 * tokens


def test_a_device_may_have_its_number():
    assert machine_of("cuda:1", "fp32", "torch") == machine_of("cuda", "fp32", "torch")
    assert machine_of("cpu:0", "fp32", "torch") == CPU
    for wrong in ("cuda:", "cuda:x", "cuda:-1", ":0", "0", "tpu:0", "cuda:0:0"):
        with pytest.raises(GraftError) as error:
            machine_of(wrong, "fp32", "torch")
        (found,) = error.value.diagnostics
        assert (found.code, found.found) == ("G823", wrong)


def test_a_student_for_a_gpu_holds_flex_attention_and_runs_alone(tmp_path: Path):
    """The plan and the build say the form; the package needs torch alone, and runs on a CPU too."""
    file = tmp_path / "local.graft"
    file.write_text(RULE % ", heads = 1")
    made = verbs.compile(
        file, _model(300), tmp_path / "build", device="cuda", dtype="bf16", copy_teacher=True
    )
    assert made.plan["machine"] == {"device": "cuda", "dtype": "bf16", "to": "torch"}
    (form,) = made.plan["edits"][0]["forms"]
    assert (form["form"], form["why"]) == ("flex", "FlexAttention, one kernel on a GPU")
    source = (tmp_path / "build/student/model.py").read_text()
    assert "class FlexWindow(SlidingWindow)" in source
    assert "import graftc" not in source
    assert "from graftc" not in source
    own = verbs.compile(file, _model(300), tmp_path / "own", copy_teacher=True)
    assert "flex" not in (tmp_path / "own/student/model.py").read_text().lower()
    student = load_package(tmp_path / "build/student")
    student.load_state_dict(load_file(tmp_path / "own/student/model.safetensors"))
    x = torch.randn(2, 300, DIM)
    with torch.no_grad():
        torch.testing.assert_close(student(x), load_package(own.path / "student")(x))


@pytest.mark.parametrize(
    ("tokens", "forced", "form"),
    [(40, "", "dense"), (300, "", "blocks"), (40, ", form = blocks", "blocks")],
)
def test_the_plan_prints_the_form_and_a_rule_forces_it(tokens, forced, form, tmp_path: Path):
    file = tmp_path / "local.graft"
    file.write_text(RULE % forced)
    (step,) = verbs.plan(file, _model(tokens)).steps
    assert step.edit.new[0].arguments["form"] == form
    made = verbs.compile(file, _model(tokens), tmp_path / "build")
    assert f"form = {form}" in made.plan["edits"][0]["after"]


def test_a_form_that_is_none_is_refused(tmp_path: Path):
    file = tmp_path / "local.graft"
    file.write_text(RULE % ", form = sparse")
    with pytest.raises(GraftError, match="form"):
        verbs.plan(file, _model(40))
    rule = RULE.replace("sliding_window(window = 2%s)", "%s")
    file.write_text(rule % "hyena_x(kernel = 5, form = causal_conv1d)")
    with pytest.raises(GraftError, match="takes 2, 3 or 4 taps, found 5") as caught:
        verbs.plan(file, _model(40))
    assert caught.value.diagnostics[0].code == "G820"
    if importlib.util.find_spec("mamba_ssm") is None:
        file.write_text(rule % "mamba2(form = mamba_ssm)")
        with pytest.raises(GraftError, match="needs the package `mamba-ssm`") as caught:
            verbs.plan(file, _model(40))
        assert caught.value.diagnostics[0].code == "G821"
    with pytest.raises(GraftError, match="device `tpu`"):
        verbs.plan(file, _model(40), device="tpu")
    with pytest.raises(ValueError, match="unknown form 'fft'"):
        _made("hyena_x", "fft", {})
    with pytest.raises(ValueError, match="along the tokens"):
        build(
            SPECS["hyena_x"],
            {"dim": 4, "causal": False, "dims": 2, "height": 2, "width": 2, "form": "shifts"},
        )
