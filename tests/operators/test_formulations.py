"""Several forms of one function: they agree, the plan says which was chosen, and a rule can force one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftc.verbs as verbs
from graftc.diagnostics import GraftError
from graftc.operators.build import build
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
    seen = torch.arange(20)
    a, b = blocks(x, mask), dense(x, mask)
    # A query all of whose keys are hidden attends to what the form holds: no answer is right there.
    near = (seen[:, None] - seen[None]).abs() <= 3
    some = (near[None] & mask[:, 0]).any(-1)
    torch.testing.assert_close(a[some], b[some], rtol=1e-4, atol=1e-5)


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
    with pytest.raises(ValueError, match="unknown form 'fft'"):
        _made("hyena_x", "fft", {})
    with pytest.raises(ValueError, match="along the tokens"):
        build(
            SPECS["hyena_x"],
            {"dim": 4, "causal": False, "dims": 2, "height": 2, "width": 2, "form": "shifts"},
        )
