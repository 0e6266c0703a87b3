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
