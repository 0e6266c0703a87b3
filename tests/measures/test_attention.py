"""Locality, influence and statistics against dense computations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftc.measures.attention import mass_by_distance, mass_of_weights
from graftc.measures.moments import Moments, cosines


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            # A view costs nothing: what counts is memory.
            if isinstance(value, Tensor):
                self.elements = max(
                    self.elements, value.untyped_storage().nbytes() // value.element_size()
                )
        return made


def dense(q, k, mask=None, causal=False, scale=None) -> Tensor:
    """Mass by distance from all weights at once, in float64: [n]."""
    n = q.shape[-2]
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = q.double() @ k.double().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    if causal:
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    index = torch.arange(n)
    distance = (index[:, None] - index).abs()
    summed = weights.flatten(0, -3).sum(0)
    return torch.stack([summed[distance == d].sum() for d in range(n)])


def hidden_padding(batch: int, n: int) -> Tensor:
    lengths = torch.tensor([n, n - 3, 2])[:batch]
    return torch.arange(n)[None, None, None] < lengths[:, None, None, None]


def one_row_hidden(n: int) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[2] = False
    return mask


N = 13
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"scale": 0.3},
    "padding": {"mask": hidden_padding(3, N)},
    "a bias for each head": {"mask": torch.randn(1, 4, N, N, generator=torch.manual_seed(1))},
    "a row that sees nothing": {"mask": one_row_hidden(N)},
    "masked and causal": {"mask": hidden_padding(3, N), "causal": True},
}


@pytest.mark.parametrize("most", [1, 40, 700, 1 << 22])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_as_dense(case: str, kv_heads: int, most: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, N, 6), torch.randn(3, kv_heads, N, 6)
    found = mass_by_distance(q, k, **CASES[case], most=most)
    torch.testing.assert_close(found, dense(q, k, **CASES[case]), rtol=1e-5, atol=1e-5)


def test_without_heads_and_in_half_precision() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, N, 6), torch.randn(4, N, 6)
    torch.testing.assert_close(mass_by_distance(q, k), mass_by_distance(q[None], k[None]))
    low = mass_by_distance(q.half() * 100, k.half() * 100)
    assert torch.isfinite(low).all()
    assert low.sum().item() == pytest.approx(4 * N, rel=1e-5)


def test_weights_that_a_model_made_itself() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, N, 6), torch.randn(2, 4, N, 6)
    weights = (q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1)
    for most in (1, 60, 1 << 20):
        found = mass_of_weights(weights, most=most)
        torch.testing.assert_close(found, dense(q, k), rtol=1e-5, atol=1e-5)


def test_nothing_of_n_by_n_is_made() -> None:
    n, most = 512, 1 << 14
    q, k = torch.randn(2, 2, n, 4), torch.randn(2, 1, n, 4)
    mask = torch.ones(2, 1, 1, n, dtype=torch.bool)
    with Largest() as seen:
        mass_by_distance(q, k, mask, most=most)
    assert seen.elements <= most
    with Largest() as seen:
        dense(q, k, mask)
    assert seen.elements >= n * n  # the mode sees what it is meant to see


@pytest.mark.slow
def test_16384_tokens() -> None:
    n, rows = 16_384, 512
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    with Largest() as seen:
        found = mass_by_distance(q, k).cumsum(0) / n
    assert seen.elements <= 1 << 22  # 1/64 of n · n
    bands, wanted = (0, 100, 5_000), torch.zeros(3, dtype=torch.float64)
    for start in range(0, n, rows):
        weights = (q[0, 0, start : start + rows] @ k[0, 0].T * 8**-0.5).softmax(-1)
        distance = (torch.arange(start, start + rows)[:, None] - torch.arange(n)).abs()
        wanted += torch.stack([weights[distance <= b].double().sum() for b in bands]) / n
    torch.testing.assert_close(found[list(bands)], wanted, rtol=1e-5, atol=1e-6)


def test_moments_as_dense_whatever_the_mean() -> None:
    torch.manual_seed(0)
    for shift, scale in ((0.0, 1.0), (1e4, 1.0), (-3.0, 1e-3)):
        x = torch.randn(3, 501, dtype=torch.float64).exp() * scale + shift
        parts = Moments()
        for part in x.split([1, 2]):
            parts = parts + Moments.of(part)
        found = parts.statistics()
        centred = x - x.mean()
        assert found.mean == pytest.approx(x.mean().item(), rel=1e-12)
        assert found.std == pytest.approx(x.std(correction=0).item(), rel=1e-9)
        assert found.absmax == x.abs().max().item()
        wanted = (centred**4).mean() / (centred**2).mean() ** 2
        assert found.kurtosis == pytest.approx(wanted.item(), rel=1e-7)


def test_a_constant_has_no_kurtosis() -> None:
    for value in (0.0, 0.1, 1e6):
        found = Moments.of(torch.full((7, 3), value)).statistics()
        assert (found.std, found.kurtosis) == (0.0, None)


def test_cosines_as_torch() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    total, count = cosines(a, b).tolist()
    assert total == pytest.approx(F.cosine_similarity(a, b, dim=-1).sum().item(), rel=1e-5)
    assert count == 10
