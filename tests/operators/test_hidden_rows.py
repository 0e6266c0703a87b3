"""A token all of whose keys a mask hides: its weighted mean is zero, in every form, and it reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor

from graftc.operators import flex
from graftc.operators.flex import FlexJointLocalAttention2d, FlexLocalAttention2d, FlexWindow
from graftc.operators.heads import attend
from graftc.operators.local_2d import JointLocalAttention2d, LocalAttention2d
from graftc.operators.sliding_window import SlidingWindow

DIM, HEADS, TOKENS, PADDED = 32, 2, 60, 20
WINDOW: dict[str, Any] = {"dim": DIM, "heads": HEADS, "window": 4}
GRID: dict[str, Any] = {"dim": DIM, "heads": HEADS, "radius": 2, "height": 10}
MIXED: dict[str, Any] = {**GRID, "width": 5, "groups": "text: full, image: local"}
OPERATORS: dict[str, Callable[[], torch.nn.Module]] = {
    "blocks": lambda: SlidingWindow(**WINDOW, form="blocks"),
    "blocks, causal": lambda: SlidingWindow(**WINDOW, causal=True, form="blocks"),
    "blocks, capped": lambda: SlidingWindow(**WINDOW, softcap=2.0, form="blocks"),
    "dense": lambda: SlidingWindow(**WINDOW, form="dense"),
    "dense, causal": lambda: SlidingWindow(**WINDOW, causal=True, form="dense"),
    "flex": lambda: FlexWindow(**WINDOW),
    "flex, causal": lambda: FlexWindow(**WINDOW, causal=True, softcap=2.0),
    "tiles": lambda: LocalAttention2d(**GRID, width=6),
    "tiles and others": lambda: LocalAttention2d(**MIXED),
    "tiles and others, capped": lambda: LocalAttention2d(**MIXED, softcap=2.0),
    "flex discs": lambda: FlexLocalAttention2d(**GRID, width=6),
    "flex discs and others": lambda: FlexLocalAttention2d(**MIXED),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention by its eager implementation."""
    monkeypatch.setattr(flex, "has_kernel", lambda *given: True)
    monkeypatch.setattr(flex, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *given: None, raising=False)


def masks(seen: Tensor) -> dict[str, Tensor]:
    """The same by False, by -inf and by the lowest number, as transformers writes it."""
    zero = torch.zeros(seen.shape)
    return {
        "False": seen,
        "-inf": zero.masked_fill(~seen, float("-inf")),
        "lowest": zero.masked_fill(~seen, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("kind", ["False", "-inf", "lowest"])
@pytest.mark.parametrize("name", OPERATORS)
def test_such_a_token_has_zeros_and_the_others_do_not_change(name: str, kind: str) -> None:
    """The first tokens are padding, which sees nothing; what the others see is what they saw without it."""
    torch.manual_seed(0)
    op = OPERATORS[name]()
    x = torch.randn(2, TOKENS, DIM, requires_grad=True)
    real = torch.arange(TOKENS) >= PADDED
    seen = (real.unsqueeze(1) & real).expand(1, 1, TOKENS, TOKENS)
    y = op(x, masks(seen)[kind])
    torch.testing.assert_close(y[:, :PADDED], op.out_proj.bias.expand(2, PADDED, DIM))
    keys = masks(real.reshape(1, 1, 1, TOKENS))[kind]
    torch.testing.assert_close(y[:, PADDED:], op(x, keys)[:, PADDED:])
    found = torch.autograd.grad(y.square().mean(), [x, *op.parameters()])
    assert all(g.isfinite().all() for g in found)
    assert not found[0][:, :PADDED].any()


@pytest.mark.parametrize("kind", ["False", "-inf", "lowest"])
@pytest.mark.parametrize("form", ["blocks", "dense", "flex"])
def test_padding_before_a_causal_window_reads_no_later_token(form: str, kind: str) -> None:
    torch.manual_seed(0)
    cls = FlexWindow if form == "flex" else SlidingWindow
    op = cls(**WINDOW, causal=True, form=form)
    x = torch.randn(1, TOKENS, DIM)
    mask = masks((torch.arange(TOKENS) >= PADDED).reshape(1, 1, 1, TOKENS))[kind]
    changed = x.clone()
    changed[:, 2 * PADDED :] += 1
    with torch.no_grad():
        torch.testing.assert_close(op(x, mask)[:, : 2 * PADDED], op(changed, mask)[:, : 2 * PADDED])


@pytest.mark.parametrize("kind", ["False", "-inf", "lowest"])
def test_forms_are_one_function_where_whole_windows_are_hidden(kind: str) -> None:
    """Windows, causal too, and discs, alone and joint with a second stream, from masks of keys."""
    joint: dict[str, Any] = {
        **GRID, "width": 5, "context_dim": DIM, "streams": "image, text", "groups": "text: full, image: local",
    }  # fmt: skip
    made: list[tuple[list[Any], tuple[int, ...]]] = [
        (
            [
                SlidingWindow(**WINDOW, causal=causal, form="blocks"),
                SlidingWindow(**WINDOW, causal=causal, form="dense"),
                FlexWindow(**WINDOW, causal=causal),
            ],
            (TOKENS,),
        )
        for causal in (False, True)
    ]
    made.append(([c(**GRID, width=6) for c in (LocalAttention2d, FlexLocalAttention2d)], (TOKENS,)))
    made.append(([c(**MIXED) for c in (LocalAttention2d, FlexLocalAttention2d)], (TOKENS,)))
    made.append(
        ([c(**joint) for c in (JointLocalAttention2d, FlexJointLocalAttention2d)], (50, 10))
    )
    seen = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    seen[0, ..., 15:40] = False
    seen[1] = False
    for operators, lengths in made:
        x = [torch.randn(2, n, DIM) for n in lengths]
        first, *others = operators
        wanted = first(*x, masks(seen)[kind])
        for other in others:
            other.load_state_dict(first.state_dict())
            torch.testing.assert_close(other(*x, masks(seen)[kind]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["False", "-inf"])
def test_full_attention_does_as_torch_does(softcap: float | None, kind: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 6, HEADS, 8)
    seen = torch.arange(6) >= 3
    y = attend(q, q, q, 0.3, masks(seen.unsqueeze(1) & seen)[kind], softcap=softcap)
    assert not y[:, :3].any()
    assert y[:, 3:].abs().amax(dim=(0, 2, 3)).min() > 0
    mask = masks(seen.reshape(1, 1, 1, 6))[kind]
    y = attend(q, q, q, 0.3, mask, causal=True, softcap=softcap)
    changed = torch.cat((q[:, :4], q[:, 4:] + 1), dim=1)
    again = attend(changed, changed, changed, 0.3, mask, causal=True, softcap=softcap)
    torch.testing.assert_close(again[:, :4], y[:, :4])  # no later token is read
