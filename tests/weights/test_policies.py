"""The init policies against what they are defined to do: to the functions that the maps compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graftc.weights import policies
from graftc.weights.fresh import fresh
from graftc.weights.parts import Affine


def _affine(outputs: int, inputs: int, bias: bool = True) -> Affine:
    return Affine(torch.randn(outputs, inputs), torch.randn(outputs) if bias else None)


def _run(source: Affine, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, source.weight, source.bias)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_copy_is_new_memory():
    a = _affine(3, 2)
    b = policies.copy(a)
    assert torch.equal(a.weight, b.weight)
    assert a.weight.data_ptr() != b.weight.data_ptr()


def test_concat_with_and_without_bias():
    a, b, x = _affine(3, 4), _affine(2, 4, bias=False), torch.randn(5, 4)
    torch.testing.assert_close(
        _run(policies.concat([a, b]), x), torch.cat([_run(a, x), _run(b, x)], -1)
    )
    assert policies.concat([b, b]).bias is None


def test_rows_columns_permute():
    a, x = _affine(4, 3), torch.randn(5, 3)
    torch.testing.assert_close(_run(policies.rows(a, 1, 3), x), _run(a, x)[:, 1:3])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(_run(policies.permute(a, order), x), _run(a, x)[:, order])
    padded = torch.cat([torch.zeros(5, 1), x[:, 1:]], 1)
    torch.testing.assert_close(_run(policies.columns(a, 1, 3), x[:, 1:]), _run(a, padded))


def test_mean_pool_averages_the_heads_of_a_group():
    a, x = _affine(4 * 3, 5), torch.randn(7, 5)
    heads = _run(a, x).reshape(7, 4, 3)
    wanted = torch.stack([heads[:, :2].mean(1), heads[:, 2:].mean(1)], 1)
    pooled = policies.mean_pool(a, heads=4, groups=2)
    torch.testing.assert_close(_run(pooled, x).reshape(7, 2, 3), wanted)
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        policies.mean_pool(a, heads=4, groups=3)


def test_repeat_undoes_mean_pool_of_equal_heads():
    a = _affine(2 * 3, 5)
    wide = policies.repeat(a, heads=2, times=4)
    back = policies.mean_pool(wide, heads=8, groups=2)
    torch.testing.assert_close(back.weight, a.weight)
    torch.testing.assert_close(back.bias, a.bias)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_product_is_one_map_after_the_other(biases):
    outer, inner, x = _affine(2, 3, biases[0]), _affine(3, 4, biases[1]), torch.randn(5, 4)
    torch.testing.assert_close(_run(policies.product(outer, inner), x), _run(outer, _run(inner, x)))


def test_identity_zero_and_one():
    x = torch.randn(5, 4)
    assert torch.equal(_run(policies.identity(4, 4), x), x)
    assert torch.equal(_run(policies.identity(2, 4), x), x[:, :2])
    wider = _run(policies.identity(6, 4), x)
    assert torch.equal(wider, F.pad(x, (0, 2)))
    assert torch.equal(_run(policies.zero(_affine(3, 4)), x), torch.zeros(5, 3))
    assert policies.zero(_affine(3, 4, bias=False)).bias is None
    assert torch.equal(_run(policies.one(_affine(3, 4)), x), torch.ones(5, 3))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_merge_starts_as_the_mean_or_the_sum_of_its_branches(share):
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    merged = _run(policies.branch_merge(4, 2, share), torch.cat([first, second], -1))
    torch.testing.assert_close(merged, share * (first + second))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_dirac_over_a_grid_passes_its_input(kernel):
    a, x = policies.dirac2d(3, kernel), torch.randn(2, 3, 5, 6)
    before = (kernel - 1) // 2
    y = F.conv2d(F.pad(x, 2 * (before, kernel - 1 - before)), a.weight, a.bias, groups=3)
    assert torch.equal(y, x)


@pytest.mark.parametrize(("taps", "causal"), [(4, True), (5, False), (4, False), (1, True)])
def test_dirac_passes_its_input(taps, causal):
    a, x = policies.dirac(3, taps, causal), torch.randn(2, 3, 9)
    left = taps - 1 if causal else (taps - 1) // 2
    y = F.conv1d(F.pad(x, (left, taps - 1 - left)), a.weight, a.bias, groups=3)
    assert torch.equal(y, x)


def _mlp(parts, x):
    up = _run(parts["up"], x)
    gate = F.silu(_run(parts["gate"], x)) if "gate" in parts else 1
    return _run(parts["down"], (F.silu(up) if "gate" not in parts else up) * gate)


@pytest.mark.parametrize("gated", [False, True])
def test_widen_is_exact(gated):
    names = ("up", "gate") if gated else ("up",)
    old = {**{n: _affine(6, 4) for n in names}, "down": _affine(4, 6)}
    new = {**{n: _affine(9, 4) for n in names}, "down": _affine(4, 9)}
    x = torch.randn(5, 4)
    grown = policies.widen(old, new)
    assert grown["down"].weight.shape == (4, 9)
    torch.testing.assert_close(_mlp(grown, x), _mlp(old, x))
    assert torch.equal(grown["up"].weight[6:], new["up"].weight[6:])


@pytest.mark.parametrize("gated", [False, True])
def test_keep_top_drops_the_neurons_that_do_nothing(gated):
    """Neurons of zero weight score lowest; without them the function is the same."""
    names = ("up", "gate") if gated else ("up",)
    parts = {**{n: _affine(6, 4) for n in names}, "down": _affine(4, 6)}
    for name in names:
        parts[name].weight[[1, 4]] = 0
    parts["down"].weight[:, [1, 4]] = 0
    kept = policies.keep_top(parts, 4, policies.magnitude(parts))
    assert torch.equal(kept["up"].weight, parts["up"].weight[[0, 2, 3, 5]])
    x = torch.randn(5, 4)
    torch.testing.assert_close(_mlp(kept, x), _mlp(parts, x))
    with pytest.raises(ValueError, match="7 neurons wanted, the site has 6"):
        policies.keep_top(parts, 7, policies.magnitude(parts))


def test_svd_is_the_best_of_its_rank():
    a = _affine(6, 5)
    inner, outer = policies.svd(a, 3)
    s = torch.linalg.svdvals(a.weight)
    error = (policies.product(outer, inner).weight - a.weight).norm()
    torch.testing.assert_close(error, s[3:].norm())
    x = torch.randn(7, 5)
    exact_inner, exact_outer = policies.svd(a, 5)
    torch.testing.assert_close(
        _run(exact_outer, _run(exact_inner, x)), _run(a, x), atol=1e-5, rtol=0
    )


def test_whitened_svd_is_better_on_the_inputs_than_svd():
    a = _affine(6, 5, bias=False)
    x = torch.randn(200, 5) * torch.tensor([10.0, 5.0, 1.0, 0.1, 0.01])
    errors = []
    for inner, outer in (policies.svd(a, 2), policies.whitened_svd(a, x.T @ x, 2)):
        errors.append((_run(outer, _run(inner, x)) - _run(a, x)).norm())
    # What no map of rank 2 can beat: the singular values of the outputs.
    best = torch.linalg.svdvals(_run(a, x))[2:].norm()
    assert errors[1] < errors[0]
    torch.testing.assert_close(errors[1], best, rtol=1e-3, atol=1e-4)


def test_fresh_is_seeded_by_seed_and_path_and_touches_no_global_state():
    module, state = nn.Linear(3, 4), torch.get_rng_state()
    before = module.weight.clone()
    a, again = fresh(module, 0, "blocks.1"), fresh(module.to(torch.bfloat16), 0, "blocks.1")
    assert torch.equal(a.weight, again.weight)
    assert not torch.equal(a.weight, fresh(module, 1, "blocks.1").weight)
    assert not torch.equal(a.weight, fresh(module, 0, "blocks.2").weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.weight, before.to(torch.bfloat16))
