"""The teacher's pass: one for all sites, cut after the last, compiled whole."""

from __future__ import annotations

import pytest
import torch

from graftc.distillation.activations import Teacher
from tests.distillation import tiny


def prepared(count: int = 4) -> tiny.Made:
    raw = {"latent": torch.stack([s["latent"] for s in tiny.latents(count)])}
    return tiny.Denoise().prepare(raw, torch.Generator().manual_seed(0))


CUTS = tuple(tiny.call(f"blocks.{i}.attn", f"blocks.{i}") for i in range(3))


def test_the_pass_is_cut_anew_as_sites_finish():
    teacher = Teacher(tiny.teacher(), tiny.INPUTS)
    whole = teacher.run(CUTS, prepared(), "a")
    assert {n for n, _ in teacher.graph(CUTS).blocks.named_children()} == {"0", "1", "2"}
    less = teacher.run(CUTS[:1], prepared(), "a")
    assert {n for n, _ in teacher.graph(CUTS[:1]).blocks.named_children()} == {"0"}
    for one, other in zip(whole.values[0], less.values[0], strict=True):
        assert torch.equal(one, other)


def test_candidates_of_one_site_share_its_cut():
    found = Teacher(tiny.teacher()).run((CUTS[1], CUTS[0], CUTS[1]), prepared(), "a").values
    assert all(one is other for one, other in zip(found[0], found[2], strict=True))
    assert not torch.equal(found[0][-1], found[1][-1])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_pass_compiles_in_one_graph_and_anew_when_it_is_cut(backend):
    plain = Teacher(tiny.teacher())
    compiled = Teacher(tiny.teacher(), compile=True, backend=backend)
    for cuts in (CUTS, CUTS[:1]):
        for one, other in zip(
            plain.run(cuts, prepared(), "a").values,
            compiled.run(cuts, prepared(), "a").values,
            strict=True,
        ):
            torch.testing.assert_close(list(one), list(other))
