"""Linears as thin products through a rule: plain at once, whitened as soon as there is data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftc.verbs as verbs
from graftc.program.model import Model

RULE = """
rule thin {
    match   l = linear in mlp
    replace l with low_rank(rank = 4)
    init    svd(l, whiten = %s)
    distill l2
}
"""


def _model() -> Model:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    return Model(torch.nn.Sequential(module), {"input": torch.randn(2, 5, 8)})


@pytest.mark.parametrize("whiten", ["none", "calibration"])
def test_a_linear_becomes_the_best_product_of_its_rank(whiten: str, tmp_path: Path) -> None:
    model = _model()
    file = tmp_path / "thin.graft"
    file.write_text(RULE % whiten)
    made = verbs.compile(file, model, tmp_path / "build")
    student = made.student()
    whole = model.module.get_submodule("0.0").weight.detach()
    product = student.get_submodule("0.0.up").weight @ student.get_submodule("0.0.down").weight
    left = torch.linalg.svdvals(whole)[4:].norm()
    torch.testing.assert_close((product - whole).norm(), left)
    waits = [p["policy"] for s in made.targets["sites"] for p in s["pending"]]
    assert waits == (["svd", "svd"] if whiten == "calibration" else [])


def test_data_at_compile_time_whitens_it(tmp_path: Path) -> None:
    """On the digits: the same rank is nearer to the teacher where its inputs are."""
    root = Path(__file__).parents[2]
    digits, errors = f"{root}/examples/digits", []
    for whiten in ("none", "calibration"):
        file = tmp_path / f"{whiten}.graft"
        rule = RULE.replace("linear in mlp", "linear in mlp in blocks {1}").replace("= 4", "= 16")
        file.write_text(rule % whiten)
        made = verbs.compile(
            file,
            f"{digits}/model.py:teacher",
            tmp_path / whiten,
            data=f"{digits}/data.py:images",
        )
        assert not any(s["pending"] for s in made.targets["sites"])
        torch.manual_seed(3)
        given = {"x": torch.randn(8, 1, 8, 8), "t": torch.full((8,), 700), "y": torch.arange(8)}
        with torch.no_grad():
            wanted = made.teacher().eval()(**given)
            errors.append(float((made.student().eval()(**given) - wanted).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_first_weights_fitted_to_a_single_sample_are_said_to_be(tmp_path: Path) -> None:
    digits = Path(__file__).parents[2] / "examples/digits"
    file = tmp_path / "r.graft"
    file.write_text((RULE % "calibration").replace("linear in mlp", "linear in mlp in blocks {1}"))
    one = [{"latent": torch.rand(1, 8, 8), "label": torch.tensor(3)}]
    made = verbs.compile(file, f"{digits}/model.py:teacher", tmp_path / "build", data=one)
    (told,) = made.manifest["notes"]
    assert "warning[G828]: first weights are fitted to a single sample" in told
