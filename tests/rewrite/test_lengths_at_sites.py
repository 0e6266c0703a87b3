"""Operators that are built for one number of tokens, at sites that have another, or any; and what else does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graftc.compiler import compile_model
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.program.model import Model


def model(tokens: int, dynamic: bool = False, **given: Any) -> Model:
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, dropout=0)
        for _ in range(2)
    ]
    if dynamic:
        given["dynamic"] = {"input": {0: "batch", 1: "tokens"}}
    return Model(nn.Sequential(*layers).eval(), {"input": torch.randn(2, tokens, 16)}, **given)


def rule(role: str, edit: str) -> str:
    return f"rule r {{\n match a = {role}\n replace a with {edit}\n distill l2\n}}"


def refused(text: str, given: Model):
    with pytest.raises(GraftError) as caught:
        compile_model(check(text), given)
    return caught.value.diagnostics[0]


DISC = "local_attention_2d(radius = 2)"
GRID = {"grid": (3, 4)}


@pytest.mark.parametrize(
    ("role", "edit", "given"),
    [
        ("mlp", "mlp_hyena_x()", {}),
        ("self_attention", DISC, GRID),
        ("self_attention", "hyena_x(kernel = 3, causal = false, dims = 2)", GRID),
        ("self_attention", "depthwise_conv(kernel = 3, dims = 2)", GRID),
    ],
)
def test_a_fixed_count_at_a_site_of_any(role: str, edit: str, given: dict[str, Any]) -> None:
    found = refused(rule(role, edit), model(12, dynamic=True, **given))
    assert found.code == "G365"
    assert found.message.startswith(
        f"`{edit.partition('(')[0]}` is built for one number of tokens, and 0"
    )
    assert (found.wanted, found.found) == (
        "a fixed number of tokens, 12 as in the example",
        "dynamic: tokens",
    )
    compile_model(check(rule(role, edit)), model(12, **given))


@pytest.mark.parametrize(
    ("role", "edit", "tokens", "says"),
    [
        ("mlp", "mlp_hyena_x(tokens = 7)", 12, "is built for 7 tokens, and 0.mlp has 12"),
        ("self_attention", DISC, 13, "is built for 12 tokens"),
        ("self_attention", "hyena_y(kernel = 3, causal = false, dims = 2)", 13, "is built for 12 tokens"),
        ("self_attention", "local_attention_2d(radius = 2, groups = {cls: full, image: local})", 12,
         "finds no tokens beside the grid at 0"),
    ],
)  # fmt: skip
def test_a_count_that_is_another(role: str, edit: str, tokens: int, says: str) -> None:
    found = refused(rule(role, edit), model(tokens, **GRID))
    assert found.code == "G366"
    assert says in found.message.replace(".self_attn", "")


@pytest.mark.parametrize("groups", ["{cls: full, image: local}", "{image: local, registers: full}"])
def test_a_disc_over_everything_beside_other_tokens_is_attention(groups: str) -> None:
    """A class token before the grid or registers after it, of any number."""
    given = model(15, dynamic=True, **GRID)
    made = compile_model(
        check(rule("self_attention", DISC.replace("2)", f"9, groups = {groups})"))), given
    )
    for tokens in (15, 20):
        x = torch.randn(2, tokens, 16)
        with torch.no_grad():
            torch.testing.assert_close(
                made.student.root(x)[0], given.module(x), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("role", "edit", "code", "says"),
    [
        ("self_attention", "hyena_x(kernel = 0)", "G122", "`kernel` of `hyena_x` is too small"),
        ("self_attention", "sliding_window(window = 0)", "G122", "`window` of `sliding_window` is too small"),
        ("self_attention", "sliding_window(window = 12)", "G355", "window = 12 covers all 12 tokens of 0.self_attn"),
        ("self_attention", "linear_window_attention(window = 20)", "G355", "covers all 12 tokens of 0.self_attn"),
        ("self_attention", "attention(heads = 3)", "G352", "`heads` of `attention` is 3"),
        ("self_attention", "mamba2(head_dim = 3)", "G358", "at 0.self_attn: mamba2: width 32 is not divisible by head_dim 3"),
        ("mlp", "hyena_x()", "G124", "`hyena_x` cannot replace a"),
    ],
)  # fmt: skip
def test_sizes_that_no_operator_has(role: str, edit: str, code: str, says: str) -> None:
    found = refused(rule(role, edit), model(12))
    assert (found.code, says in found.message) == (code, True), found.message
    assert code in ("G122", "G124") or "0" in str(found.site)


@pytest.mark.parametrize(
    "edit",
    ["hyena_x(causal = false)", "mamba2(causal = false)", DISC, "depthwise_conv(kernel = 3)"],
)
def test_a_causal_site_takes_no_operator_of_both_sides(edit: str) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Causal()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.attn(x.tanh())

    given = Model(Whole().eval(), {"x": torch.randn(2, 12, 64)}, **GRID)
    found = refused(rule("self_attention", edit), given)
    assert found.code == "G353"
    assert found.message.startswith(f"`{edit.partition('(')[0]}` at attn would see later tokens")


@pytest.mark.parametrize("shape", [(0, 12, 16), (2, 0, 16)])
def test_an_example_of_no_samples_or_no_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(GraftError) as caught:
        Model(nn.Linear(16, 16), {"input": torch.zeros(shape)})
    found = caught.value.diagnostics[0]
    assert (found.code, found.found) == ("G567", str(list(shape)))


def test_a_student_of_one_length_on_others_and_on_no_samples() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    given = Model(Residual(mlp).eval(), {"x": torch.randn(2, 12, 16)})
    student = compile_model(check(rule("mlp", "mlp_hyena_x()")), given).student.root
    assert student(torch.zeros(0, 12, 16))[0].shape == (0, 12, 16)
    for tokens in (0, 7):
        with pytest.raises(ValueError, match=f"mlp_hyena_x: {tokens} tokens, built for 12"):
            student(torch.zeros(2, tokens, 16))
