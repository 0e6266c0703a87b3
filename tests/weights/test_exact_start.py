"""What can start exact does, and is not trained: self-grafts, wider MLPs, grown blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

import graftc.verbs as verbs

DIGITS = Path(__file__).parents[2] / "examples/digits"
MODEL, DATA = f"{DIGITS}/model.py:teacher", f"{DIGITS}/data.py:images"

RULES = {
    "self-graft": "match a = self_attention in blocks {1, 5}\n replace a with attention()",
    "wider MLP": "match a = mlp in blocks {1, 5}\n replace a with mlp(ratio = 6)",
    "grown block": (
        "match a = block in blocks {1, 5}\n"
        " replace with parallel(a, copy(a), merge = lerp(start = 0.5))"
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_it_starts_at_error_0_and_stage_1_is_skipped(name: str, tmp_path: Path) -> None:
    file = tmp_path / "exact.graft"
    file.write_text(f"rule same {{\n {RULES[name]}\n distill l2\n}}\n")
    build = verbs.compile(file, MODEL, tmp_path / "build")
    run = verbs.distill(build, DATA, samples=64, batch=32, steps=50)
    assert len(run.sites) == 2
    for site in run.sites:
        assert site.error_start <= 1e-10
        assert site.error_end == site.error_start
        assert site.steps == 0
    assert run.steps == 0


def test_a_narrower_mlp_waits_for_data_and_a_wider_one_does_not(tmp_path: Path) -> None:
    for ratio, waits in ((3, ["fc2"]), (6, [])):
        file = tmp_path / "thin.graft"
        file.write_text(
            f"rule thin {{\n match a = mlp in blocks {{1}}\n replace a with mlp(ratio = {ratio})\n distill l2\n}}\n"
        )
        build = verbs.compile(file, MODEL, tmp_path / f"build{ratio}")
        assert [p["linear"] for s in build.targets["sites"] for p in s["pending"]] == waits
