"""Least squares from streamed normal equations, against torch.linalg.lstsq on all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graftc.operators.hyena import HyenaX
from graftc.operators.linear import TokenLinear
from graftc.operators.mlp import Mlp
from graftc.operators.parallel import LinearMerge
from graftc.weights import policies
from graftc.weights.least_squares import NormalEquations
from graftc.weights.parts import Affine
from graftc.weights.solve import solve_least_squares, solve_svd


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _rows(n: int = 200):
    x = torch.randn(n, 5, dtype=torch.float64) + 3
    return x, torch.randn(n, 4, dtype=torch.float64) + x[:, :4] * 2


def test_batches_give_the_solution_of_all_rows():
    x, y = _rows()
    equations = NormalEquations(5, 4)
    for i in range(0, 200, 37):
        equations.add(x[i : i + 37], y[i : i + 37])
    weight, bias = equations.solve(ridge=0)
    ones = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(weight, wanted[:5].T)
    torch.testing.assert_close(bias, wanted[5])
    error = (y - x @ weight.T - bias).norm() / y.norm()
    assert equations.relative_error(weight, bias) == pytest.approx(float(error), rel=1e-9)
    assert equations.relative_error(weight, None) == pytest.approx(
        float((y - x @ weight.T).norm() / y.norm()), rel=1e-9
    )


def test_without_bias():
    x, y = _rows()
    equations = NormalEquations(5, 4)
    equations.add(x, y)
    weight, bias = equations.solve(ridge=0, bias=False)
    torch.testing.assert_close(weight, torch.linalg.lstsq(x, y).solution.T)
    assert torch.equal(bias, torch.zeros(4, dtype=torch.float64))


def test_ridge_shrinks_the_weight_and_not_the_bias():
    x, y = _rows()
    equations = NormalEquations(5, 4)
    equations.add(x, y)
    weight, bias = equations.solve(ridge=1e9)
    assert weight.norm() < 1e-6
    torch.testing.assert_close(bias, y.mean(0), rtol=1e-4, atol=1e-4)


def test_fewer_rows_than_inputs_and_an_input_that_never_varies():
    x = torch.cat([torch.randn(3, 5), torch.ones(3, 1)], 1)
    y = torch.randn(3, 2)
    equations = NormalEquations(6, 2)
    equations.add(x, y)
    for ridge in (0, 1e-12):
        weight, bias = equations.solve(ridge=ridge)
        assert torch.isfinite(weight).all()
        assert equations.relative_error(weight, bias) < 1e-4


def test_refusals():
    equations = NormalEquations(1, 1)
    with pytest.raises(ValueError, match="no rows"):
        equations.solve()
    with pytest.raises(ValueError, match="not finite"):
        equations.add(torch.tensor([[float("nan")]]), torch.ones(1, 1))


def test_token_linear_recovers_a_linear_map():
    teacher, student = TokenLinear(6), TokenLinear(6)
    x = torch.randn(4, 20, 6)
    found = solve_least_squares(student, "proj", [((x,), teacher(x))], ridge=0)
    assert found.before > 0.5
    assert found.after < 1e-6
    assert found.rows == 80
    torch.testing.assert_close(student(x), teacher(x), rtol=1e-4, atol=1e-5)


def test_the_output_projection_of_an_operator():
    """What was solved is a minimum: no small step of the projection is better."""
    student = HyenaX(6)
    batches = [((x,), x.roll(1, dims=1) * x) for x in torch.randn(3, 4, 20, 6)]
    state = {k: v.clone() for k, v in student.state_dict().items()}
    found = solve_least_squares(student, "out_proj", batches, ridge=0)
    assert found.after < found.before
    for name, value in student.state_dict().items():
        assert torch.equal(value, state[name]) != name.startswith("out_proj")

    def error() -> float:
        with torch.no_grad():
            misses = [(student(*inputs) - target).square().sum() for inputs, target in batches]
            return float(sum(misses))

    least = error()
    energy = sum(float(t.square().sum()) for _, t in batches)
    assert found.after == pytest.approx((least / energy) ** 0.5, rel=1e-4)
    for _ in range(5):
        step = 0.05 * torch.randn(6, 6)
        with torch.no_grad():
            student.out_proj.weight += step
            assert error() > least
            student.out_proj.weight -= step


def test_the_projection_of_a_merge():
    merge = LinearMerge(4, 2)
    a, b = torch.randn(2, 3, 30, 4)
    found = solve_least_squares(merge, "proj", [((a, b), 2 * a - b + 1)], ridge=0)
    assert found.after < 1e-6


def test_a_half_precision_module_keeps_its_dtype():
    student = TokenLinear(4).to(torch.bfloat16)
    x = torch.randn(2, 50, 4, dtype=torch.bfloat16)
    solve_least_squares(student, "proj", [((x,), x)])
    assert student.proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(student.proj.weight.float(), torch.eye(4), rtol=0, atol=1e-2)


def test_a_map_that_is_not_the_last_is_refused():
    x = torch.randn(1, 5, 4)
    with pytest.raises(ValueError, match="fc1 is not the module's last map"):
        solve_least_squares(Mlp(4, 2), "fc1", [((x,), x)])
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="0 ran 2 times"):
        solve_least_squares(nn.Sequential(linear, linear), "0", [((x,), x)])
    with pytest.raises(ValueError, match="is a TokenFilter, not a Linear"):
        solve_least_squares(HyenaX(4), "short_filter", [((x,), x)])
    with pytest.raises(ValueError, match=r"the target is \[1, 5, 3\]"):
        solve_least_squares(TokenLinear(4), "proj", [((x,), x[..., :3])])
    assert not TokenLinear(4).proj._forward_hooks


def test_a_whitened_product_is_better_on_its_inputs_than_a_plain_one():
    """SVD-LLM: what the inputs hardly hold may go, however large the weights are there."""
    torch.manual_seed(0)
    whole = torch.nn.Linear(12, 10).double()
    x = torch.randn(400, 12).double() * torch.logspace(-2, 1, 12).double()
    plain = torch.nn.Sequential(torch.nn.Linear(12, 4, bias=False), torch.nn.Linear(4, 10)).double()
    inner, outer = policies.svd(Affine(whole.weight.detach(), whole.bias.detach()), 4)
    with torch.no_grad():
        plain[0].weight.copy_(inner.weight)
        plain[1].weight.copy_(outer.weight)
        plain[1].bias.copy_(whole.bias)
        found = solve_svd(
            plain, "0", "1", [((x[:200],), whole(x[:200])), ((x[200:],), whole(x[200:]))]
        )
        own = float((plain(x) - whole(x)).norm() / whole(x).norm())
    assert found.after < 0.2 * found.before
    assert own == pytest.approx(found.after, rel=1e-3)
